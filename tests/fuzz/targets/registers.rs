//! Any accesses to a device's page, between turns of the device. Each is a byte for what and how wide, a byte
//! for where, and what a write needs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Once;
use xen_virtio_fuzz::{Numbers, driver, make_device, reset_device, run_device, state_area};
use xen_virtio_transport::Width;

static DEVICE: Once = Once::new();

fuzz_target!(|input: &[u8]| {
    DEVICE.call_once(|| assert!(make_device(state_area())));
    let driver = driver();
    let mut numbers = Numbers(input);
    while !numbers.is_empty() {
        let what = numbers.byte();
        let width = [Width::One, Width::Two, Width::Four, Width::Eight][usize::from(what & 3)];
        // Registers are at multiples of four; anything else is refused.
        let place = u64::from(numbers.byte());
        let offset = if what & 4 == 0 { 4 * place } else { place };
        match what >> 3 & 3 {
            0 => drop(driver.raw_read(offset, width)),
            1 => driver.raw_write(offset, width, numbers.byte().into()),
            2 => driver.raw_write(offset, width, numbers.u64()),
            _ => run_device(),
        }
    }
    run_device();
    reset_device();
});
