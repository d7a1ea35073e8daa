//! Any state file: a device that goes on from it, or an error; and a reset that ends all that it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xen_virtio_backend::{StateArea, StateCell};
use xen_virtio_dom0_tools::state::GuestState;
use xen_virtio_fuzz::{
    BASE, KEY, Numbers, backing, driver, make_device, reset_device, run_device, state_area,
};
use xen_virtio_guest_io::{BlkRequest, RawQueue};

/// Where the parts of the first slot are in the file: its name, the device's words, the registers and the
/// journals of the two queues.
const NAME: usize = 4096;
const REGISTERS: usize = 2 * 4096;
const JOURNALS: usize = REGISTERS + (4 << 10);
const JOURNAL: usize = 12 << 10;

/// Requests that the journals may speak of are at these descriptors.
const HEADS: [u16; 3] = [0, 3, 6];

thread_local! {
    static AREA: StateArea = {
        let driver = driver();
        // The first memory of the guest, so that the seeds know its references.
        let queue = RawQueue::new(&driver, 16);
        for head in HEADS {
            BlkRequest::new(&driver, 0, 0, 512, true).describe(&queue, head);
        }
        state_area()
    };
}

fn cell(area: &StateArea, offset: usize, len: usize, numbers: &mut Numbers<'_>) {
    let len_of_text = usize::from(numbers.u16()).min(numbers.0.len());
    let (text, rest) = numbers.0.split_at(len_of_text);
    numbers.0 = rest;
    let _ = StateCell::new(area.part(offset, len)).store(text);
}

fuzz_target!(|input: &[u8]| {
    AREA.with(|area| {
        area.part(0, JOURNALS + 2 * JOURNAL).zero();
        let mut numbers = Numbers(input);
        let how = numbers.byte();
        drop(GuestState::new(area.clone()).expect("zeros"));
        if how & 1 == 0 {
            let state = GuestState::new(area.clone()).expect("a state file");
            drop(state.slot(KEY, BASE, backing(), false).expect("room"));
        } else {
            cell(area, NAME, 1024, &mut numbers);
        }
        cell(area, REGISTERS, 4 << 10, &mut numbers);
        if how & 2 != 0 {
            // Anywhere, the words that say how long something is among them.
            for _ in 0..numbers.byte() % 8 {
                let word = usize::from(numbers.u16()) % (JOURNALS / 8);
                area.store(word, numbers.u64());
            }
        }
        while !numbers.is_empty() {
            let queue = usize::from(numbers.byte() & 1);
            let word = usize::from(numbers.u16()) % 513;
            let value = if how & 4 == 0 {
                numbers.u16().into()
            } else {
                numbers.u64()
            };
            area.part(JOURNALS + queue * JOURNAL, JOURNAL)
                .store(word, value);
        }
        if make_device(area.clone()) {
            run_device();
            reset_device();
        }
    });
});
