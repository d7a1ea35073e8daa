//! A driver whose disk hangs, as it asks for: it resets the device under a write, starts anew, and writes the same sector again.

use anyhow::{Result, ensure};
use std::thread::sleep;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;
use xen_virtio_guest_io::{BlkRequest, Driver, NO_STATUS, RawQueue};
use xen_virtio_transport::Register;

const QUEUE_SIZE: u16 = 8;
/// The sector that two drivers write, one after the other; 32 is Linux's, before them.
const CONTESTED: u64 = 8;
const SECTOR_BYTES: usize = 512;
/// What a stop may take of a disk that hangs for seconds.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// What takes as long hangs.
const HUNG: Duration = Duration::from_secs(3);
/// How long a write may take in the end.
const END_LIMIT: Duration = Duration::from_secs(600);

/// A write that is under way.
struct Write {
    request: BlkRequest,
    text: &'static str,
    began: Instant,
}

fn begin(driver: &Driver, queue: &mut RawQueue, sector: u64, text: &'static str) -> Write {
    let request = BlkRequest::new(driver, VIRTIO_BLK_T_OUT, sector, SECTOR_BYTES, false);
    request
        .data
        .write(0, format!("{text:SECTOR_BYTES$}").as_bytes());
    request.describe(queue, 0);
    queue.offer(0);
    driver.notify(0);
    Write {
        request,
        text,
        began: Instant::now(),
    }
}

/// Asks dom0 to have the disk hang, and writes until a write does not end any more.
fn begin_hanging(
    driver: &Driver,
    queue: &mut RawQueue,
    sector: u64,
    text: &'static str,
) -> Result<Write> {
    println!("hung: hang it for {text}");
    let asked = Instant::now();
    loop {
        let used = queue.used_index();
        let write = begin(driver, queue, sector, text);
        while queue.used_index() == used {
            if write.began.elapsed() > HUNG {
                println!("hung: {text} is under way");
                return Ok(write);
            }
            sleep(Duration::from_millis(100));
        }
        ensure!(asked.elapsed() < END_LIMIT, "the disk does not hang");
    }
}

/// Waits until the only write that is under way has ended.
fn end(write: &Write) -> Result<()> {
    let text = write.text;
    while write.request.status.read() == [NO_STATUS] {
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
    let old = begin_hanging(driver, &mut queue, CONTESTED, "old")?;
    let stopped = Instant::now();
    driver.write(Register::Status, 0);
    ensure!(driver.read(Register::Status) == 0, "the reset is not done");
    let took = stopped.elapsed();
    println!("hung: reset took {} us", took.as_micros());
    ensure!(took < STOP_LIMIT, "the reset waited for the disk");
    let mut next = driver.start(QUEUE_SIZE);
    let new = begin(driver, &mut next, CONTESTED, "new");
    println!("hung: new is under way");
    end(&new)?;
    ensure!(
        old.request.status.read() == [NO_STATUS],
        "a request of the driver before was given back"
    );
    for (sector, text) in [(16, "third"), (24, "last")] {
        let write = begin_hanging(driver, &mut next, sector, text)?;
        end(&write)?;
    }
    Ok(())
}
