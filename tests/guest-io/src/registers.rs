//! Accesses at random over a device's registers, as nobody's driver makes them.

use anyhow::Result;
use xen_virtio_guest_io::board::BoardDevice;
use xen_virtio_guest_io::{Driver, Random};
use xen_virtio_transport::Width;

/// Bytes of a device's page.
const PAGE: usize = 0x200;

/// Makes `count` accesses to the device at `base`, reads and writes of every width.
pub(crate) fn run(base: u64, count: u64) -> Result<()> {
    let driver = Driver::new(BoardDevice::open(base)?);
    let mut random = Random(base);
    for _ in 0..count {
        let width = [Width::One, Width::Two, Width::Four, Width::Eight][random.below(4)];
        let offset = (random.below(PAGE / width.bytes()) * width.bytes()) as u64;
        match random.below(4) {
            0 => drop(driver.raw_read(offset, width)),
            // What a driver might write, now and then.
            1 => driver.raw_write(offset, width, random.number() & 0xf),
            _ => driver.raw_write(offset, width, random.number()),
        }
    }
    println!("registers: {count} accesses at random, all answered");
    Ok(())
}
