//! A driver whose disk hangs: it resets the device under a write, starts anew, and writes the same sector again.

use anyhow::{Result, ensure};
use std::thread::sleep;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;
use xen_virtio_guest_io::{BlkRequest, Driver, RawQueue};
use xen_virtio_transport::Register;

const QUEUE_SIZE: u16 = 8;
const SECTOR: u64 = 8;
const SECTOR_BYTES: usize = 512;
/// What a stop may take of a disk that hangs for seconds.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// How long a write may take in the end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A write that is under way.
struct Write {
    request: BlkRequest,
    text: &'static str,
    began: Instant,
}

fn begin(driver: &Driver, queue: &mut RawQueue, text: &'static str) -> Write {
    let request = BlkRequest::new(driver, VIRTIO_BLK_T_OUT, SECTOR, SECTOR_BYTES, false);
    request
        .data
        .write(0, format!("{text:SECTOR_BYTES$}").as_bytes());
    request.describe(queue, 0);
    queue.offer(0);
    driver.notify(0);
    println!("hung: {text} is under way");
    Write {
        request,
        text,
        began: Instant::now(),
    }
}

/// Waits until the queue's request number `used` has ended.
fn end(write: &Write, queue: &RawQueue, used: u16) -> Result<()> {
    let text = write.text;
    while queue.used_index() != used {
        ensure!(write.began.elapsed() < END_LIMIT, "{text} never ended");
        sleep(Duration::from_millis(1));
    }
    ensure!(write.request.status.read() == [0], "{text} failed");
    println!(
        "hung: {text} ended after {} ms",
        write.began.elapsed().as_millis()
    );
    Ok(())
}

/// Prints a line for each thing that was begun and that ended; the last write may never.
///
/// # Errors
///
/// If a stop waits for the disk, or a write fails.
pub(crate) fn run(driver: &Driver) -> Result<()> {
    let mut queue = driver.start(QUEUE_SIZE);
    let old = begin(driver, &mut queue, "old");
    sleep(Duration::from_secs(1));
    ensure!(queue.used_index() == 0, "the disk does not hang");
    let stopped = Instant::now();
    driver.write(Register::Status, 0);
    ensure!(driver.read(Register::Status) == 0, "the reset is not done");
    let took = stopped.elapsed();
    println!("hung: reset took {} us", took.as_micros());
    ensure!(took < STOP_LIMIT, "the reset waited for the disk");
    let mut next = driver.start(QUEUE_SIZE);
    let new = begin(driver, &mut next, "new");
    end(&new, &next, 1)?;
    ensure!(
        old.request.status.read() == [xen_virtio_guest_io::NO_STATUS],
        "a request of the driver before was given back"
    );
    let third = begin(driver, &mut next, "third");
    end(&third, &next, 2)?;
    let last = begin(driver, &mut next, "last");
    end(&last, &next, 3)
}
