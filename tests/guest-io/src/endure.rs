//! A driver whose device is served by anybody: it reads, resets the device when that wants it or does nothing for a while, and
//! begins anew.

use anyhow::Result;
use std::thread::sleep;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use xen_virtio_guest_io::{BlkRequest, Driver};
use xen_virtio_transport::Register;

const QUEUE_SIZE: u16 = 8;
const SECTOR_BYTES: usize = 512;
/// How long a read may take, before the device is reset.
const PATIENCE: Duration = Duration::from_millis(500);

/// Says what came of each read, for ever.
pub(crate) fn run(driver: &Driver) -> Result<()> {
    for count in 0u64.. {
        let mut queue = driver.start(QUEUE_SIZE);
        let request = BlkRequest::new(driver, VIRTIO_BLK_T_IN, count % 8, SECTOR_BYTES, true);
        request.describe(&queue, 0);
        let used = queue.used_index();
        queue.offer(0);
        driver.notify(0);
        let end = Instant::now() + PATIENCE;
        let outcome = loop {
            if queue.used_index() != used {
                break match request.status.read()[0] {
                    0 => "reads",
                    _ => "fails",
                };
            }
            if driver.needs_reset() {
                break "resets";
            }
            if Instant::now() > end {
                break "waits";
            }
            sleep(Duration::from_millis(1));
        };
        // Before its memory is the kernel's again: a request that was not answered may be until then.
        driver.write(Register::Status, 0);
        println!("endures: {outcome} {count}");
        sleep(Duration::from_millis(100));
    }
    Ok(())
}
