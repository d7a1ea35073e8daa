//! Block requests by hand.

use crate::driver::Driver;
use crate::queue::{Buffer, RawQueue};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
const _: () = assert!(NEXT as u32 == VRING_DESC_F_NEXT && WRITE as u32 == VRING_DESC_F_WRITE);

/// A request with its header, one buffer of data, and its status, each granted.
pub struct BlkRequest {
    pub header: Buffer,
    pub data: Buffer,
    pub status: Buffer,
    reads: bool,
}

/// What the status byte is before the device writes it.
pub const NO_STATUS: u8 = 0xee;

impl BlkRequest {
    /// `kind` is `VIRTIO_BLK_T_*`; `reads`: the data is for the device to write.
    pub fn new(driver: &Driver, kind: u32, sector: u64, len: usize, reads: bool) -> Self {
        let header = driver.buffer(16, false);
        header.write(0, &kind.to_le_bytes());
        header.write(8, &sector.to_le_bytes());
        let status = driver.buffer(1, true);
        status.write(0, &[NO_STATUS]);
        Self {
            header,
            data: driver.buffer(len.max(1), reads),
            status,
            reads,
        }
    }

    /// Writes the chain from descriptor `head` on.
    pub fn describe(&self, queue: &RawQueue, head: u16) {
        let data_flags = NEXT | if self.reads { WRITE } else { 0 };
        let len = u32::try_from(self.data.len).expect("a small buffer");
        queue.set_descriptor(head, self.header.address(), 16, NEXT, head + 1);
        queue.set_descriptor(head + 1, self.data.address(), len, data_flags, head + 2);
        queue.set_descriptor(head + 2, self.status.address(), 1, WRITE, 0);
    }

    /// Sends the request alone on queue 0, and waits for it. The status, and the length in the used ring.
    pub fn perform(&self, driver: &Driver, queue: &mut RawQueue) -> (u8, u32) {
        self.describe(queue, 0);
        let used = queue.used_index();
        queue.offer(0);
        driver.notify(0);
        assert!(
            driver.wait(|| queue.used_index() != used),
            "the request was never completed"
        );
        (self.status.read()[0], queue.used(used).1)
    }
}
