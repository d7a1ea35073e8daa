//! The entropy device, by the one driver.

use std::time::{Duration, Instant};
use xen_virtio_backend::OneByOne;
use xen_virtio_backend::rng::Rng;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{SimGuest, SimMachine};
use xen_virtio_tests::{Buffer, Driver, RawQueue, WRITE, driver};
use xen_virtio_transport::Register;

const SIZE: u16 = 16;

/// A guest whose device gives `rate` bytes a second.
fn guest(rate: u64) -> (SimGuest, SimMachine) {
    SimMachine::start(AddressMode::Grants, move || {
        Ok(vec![Box::new(OneByOne::new(Rng::new(rate)?))])
    })
    .unwrap()
}

/// Asks for `len` bytes at `buffer`. How many came, as used element `index`.
fn ask(driver: &Driver, queue: &mut RawQueue, buffer: &Buffer, len: u32, index: u16) -> u32 {
    queue.set_descriptor(0, buffer.address(), len, WRITE, 0);
    queue.offer(0);
    driver.notify(0);
    assert!(driver.wait(|| queue.used_index() != index), "no answer");
    assert!(!driver.needs_reset());
    queue.used(index).1
}

#[test]
fn buffers_of_any_length_are_filled_as_far_as_a_page() {
    let (guest, machine) = guest(1 << 30);
    let driver = driver(&guest, 0);
    assert_eq!(driver.read(Register::DeviceId), 4);
    let mut queue = driver.start(SIZE);
    let lens = [(1, 1), (64, 64), (4096, 4096), (3 * 4096, 4096)];
    for ((len, expected), index) in lens.into_iter().zip(0..) {
        let buffer = driver.buffer(len as usize, true);
        let written = ask(&driver, &mut queue, &buffer, len, index);
        assert_eq!(written, expected, "{len}");
        let bytes = buffer.read();
        if len > 16 {
            assert!(bytes[..16].iter().any(|byte| *byte != 0));
        }
        assert!(bytes[expected as usize..].iter().all(|byte| *byte == 0));
    }
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!((report.requests, report.request_errors), (4, 0));
    assert_eq!(report.metrics["entropy_bytes"], 1 + 64 + 2 * 4096);
}

#[test]
fn no_more_is_given_than_the_rate_allows_however_small_the_requests() {
    let (guest, machine) = guest(64 * 100);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    let buffer = driver.buffer(1, true);
    let began = Instant::now();
    for index in 0..51 {
        assert_eq!(ask(&driver, &mut queue, &buffer, 1, index), 1);
    }
    // Ten at once in each tenth of a second.
    assert!(
        began.elapsed() >= Duration::from_millis(390),
        "{:?}",
        began.elapsed()
    );
    drop(machine.stop().unwrap());
}

#[test]
fn memory_that_cannot_be_written_comes_back_empty() {
    let (guest, machine) = guest(1 << 30);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    let buffer = driver.buffer(64, false);
    assert_eq!(ask(&driver, &mut queue, &buffer, 64, 0), 0);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!((report.requests, report.request_errors), (1, 1));
}
