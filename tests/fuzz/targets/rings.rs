//! Any descriptors, rings and requests, with the block device behind them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;
use xen_virtio_fuzz::{Numbers, driver, make_device, reset_device, run_device, state_area};
use xen_virtio_guest_io::{Buffer, Driver, Negotiated, RawQueue};

const SIZE: u16 = 16;

struct Guest {
    driver: Driver,
    queue: RawQueue,
    /// Memory that requests may use: read-only for the device, writable, and of several pages.
    buffers: [Buffer; 3],
}

thread_local! {
    static GUEST: OnceCell<Guest> = const { OnceCell::new() };
}

fn guest() -> Guest {
    assert!(make_device(state_area()));
    let driver = driver();
    Guest {
        queue: RawQueue::new(&driver, SIZE),
        buffers: [
            driver.buffer(4096, false),
            driver.buffer(4096, true),
            driver.buffer(3 * 4096, true),
        ],
        driver,
    }
}

/// An address: mostly one that means something.
fn address(guest: &Guest, numbers: &mut Numbers<'_>) -> u64 {
    let which = numbers.byte();
    let offset = u64::from(numbers.u16()) & 0xfff;
    match which & 7 {
        index @ 0..=5 => guest.buffers[usize::from(index % 3)].address() + offset,
        6 => guest.queue.addresses()[usize::from(which >> 3) % 3] + offset,
        _ => numbers.u64(),
    }
}

fuzz_target!(|input: &[u8]| {
    GUEST.with(|cell| {
        let guest = cell.get_or_init(guest);
        let driver = &guest.driver;
        let mut numbers = Numbers(input);
        // EVENT_IDX or not, flushes or not.
        let without = u64::from(numbers.byte() & 1) << 29 | u64::from(numbers.byte() & 1) << 9;
        let negotiated = driver.negotiate(driver.offered_features() & !without);
        assert_eq!(negotiated, Negotiated::Accepted);
        for area in [&guest.queue.available, &guest.queue.used] {
            area.write(0, &[0; 6 + 8]);
        }
        driver.start_queue(0, SIZE.into(), guest.queue.addresses());
        driver.driver_ok();
        while !numbers.is_empty() {
            for _ in 0..numbers.byte() % 8 {
                let index = u16::from(numbers.byte()) % SIZE;
                let at = address(guest, &mut numbers);
                let (len, flags) = (numbers.u32() & 0xf_ffff, numbers.byte() & 7);
                let next = numbers.byte().into();
                guest
                    .queue
                    .set_descriptor(index, at, len, flags.into(), next);
            }
            // A request's header: what, and which sector.
            let header = &guest.buffers[0];
            let place = usize::from(numbers.u16() & 0xff0);
            header.write(place, &u32::from(numbers.byte()).to_le_bytes());
            header.write(place + 8, &u64::from(numbers.u16()).to_le_bytes());
            for slot in 0..numbers.byte() % 4 {
                let head = u16::from(numbers.byte()).to_le_bytes();
                guest
                    .queue
                    .available
                    .write(4 + 2 * usize::from(slot), &head);
            }
            guest
                .queue
                .set_available_index(u16::from(numbers.byte()) % (2 * SIZE));
            guest.queue.set_used_event(numbers.byte().into());
            driver.notify(0);
            run_device();
        }
        reset_device();
    });
});
