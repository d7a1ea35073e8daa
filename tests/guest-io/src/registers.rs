//! Accesses at random over a device's registers, as nobody's driver makes them, between real starts of a driver: so they
//! meet queues that run.

use anyhow::{Result, ensure};
use xen_virtio_guest_io::board::BoardDevice;
use xen_virtio_guest_io::{Driver, Negotiated, Random, RawQueue};
use xen_virtio_transport::{Register, Width};

/// Bytes of a device's page.
const PAGE: usize = 0x200;
/// One in so many accesses is a whole start of a driver.
const START: usize = 40;
const SIZE: u16 = 64;

/// What every read of these registers gives, whatever the driver has done (virtio 1.3, 4.2.2).
const CONSTANT: [(Register, u64); 3] = [
    (Register::MagicValue, 0x7472_6976),
    (Register::Version, 2),
    (Register::DeviceId, 2),
];

#[derive(Debug, Default)]
struct Counts {
    starts: u64,
    /// Of a device whose driver was ready: resets, queues stopped, notifications.
    resets: u64,
    stops: u64,
    notifies: u64,
    checked: u64,
}

/// Makes `count` accesses to the device at `base`, reads and writes of every width, the same ones for the same `seed`.
pub(crate) fn run(base: u64, count: u64, seed: u64) -> Result<()> {
    let driver = Driver::new(BoardDevice::open(base)?);
    let mut random = Random(seed);
    let mut counts = Counts::default();
    // The device may use its memory until the next start resets it.
    let mut queue = None;
    for _ in 0..count {
        if random.below(START) == 0 {
            let next = start(&driver);
            counts.starts += u64::from(next.is_some());
            queue = next;
            continue;
        }
        let width = [Width::One, Width::Two, Width::Four, Width::Eight][random.below(4)];
        let offset = (random.below(PAGE / width.bytes()) * width.bytes()) as u64;
        match random.below(4) {
            0 => check(&driver, offset, width, &mut counts)?,
            // What a driver might write, now and then.
            1 => write(
                &driver,
                offset,
                width,
                random.number() & 0xf,
                queue.is_some(),
                &mut counts,
            ),
            2 => {
                let register = [
                    Register::Status,
                    Register::QueueReady,
                    Register::QueueNotify,
                ][random.below(3)];
                let value = random.below(2) as u64;
                write(
                    &driver,
                    register.offset(),
                    Width::Four,
                    value,
                    queue.is_some(),
                    &mut counts,
                );
            }
            _ => write(
                &driver,
                offset,
                width,
                random.number(),
                queue.is_some(),
                &mut counts,
            ),
        }
    }
    driver.write(Register::Status, 0);
    drop(queue);
    println!("registers: {count} accesses at random, seed {seed}, all answered: {counts:?}");
    Ok(())
}

fn start(driver: &Driver) -> Option<RawQueue> {
    if driver.negotiate(driver.offered_features()) == Negotiated::Refused {
        return None;
    }
    let queue = RawQueue::new(driver, SIZE);
    driver.start_queue(0, SIZE.into(), queue.addresses());
    driver.driver_ok();
    Some(queue)
}

fn check(driver: &Driver, offset: u64, width: Width, counts: &mut Counts) -> Result<()> {
    let value = driver.raw_read(offset, width);
    if width != Width::Four {
        return Ok(());
    }
    for (register, expected) in CONSTANT {
        if offset == register.offset() {
            ensure!(
                value == expected,
                "{register:?} reads {value:#x} instead of {expected:#x}"
            );
            counts.checked += 1;
        }
    }
    Ok(())
}

fn write(driver: &Driver, offset: u64, width: Width, value: u64, live: bool, counts: &mut Counts) {
    if live && width == Width::Four && driver.read(Register::Status) & 4 != 0 {
        let is = |register: Register| offset == register.offset();
        counts.resets += u64::from(is(Register::Status) && value == 0);
        counts.stops += u64::from(is(Register::QueueReady) && value == 0);
        counts.notifies += u64::from(is(Register::QueueNotify) && value == 0);
    }
    driver.raw_write(offset, width, value);
}
