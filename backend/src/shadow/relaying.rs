//! One request in the region: where its buffers are there, and what is copied.

use super::ring::Part;
use crate::engine::PageRun;
use crate::virtqueue::Request;
use smallvec::SmallVec;
use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_guest_mapping::{CopyOp, Direction, PAGE_SIZE};

/// Shorter buffers share a page; others begin at one, as direct I/O wants them.
const SMALL_BUFFER: u32 = 512;
const SMALL_ALIGNMENT: usize = 16;

/// Where the buffers of a request are to be, from the beginning of its pages.
pub(super) struct Plan {
    /// One for each of the guest's, in its order.
    pub(super) parts: SmallVec<[Part; 4]>,
    /// What the back-end gets: a part that follows one of whole pages, and goes the same way, is one with it. A device "MUST NOT make
    /// assumptions about the particular arrangement of descriptors" (virtio 1.3, 2.7.4.1), but some do: a packet of
    /// vhost-device-vsock has a header and one more descriptor.
    pub(super) descriptors: SmallVec<[Part; 4]>,
    pub(super) bytes: usize,
    /// There is nothing for the back-end to read.
    pub(super) receives: bool,
}

impl Plan {
    pub(super) fn of(request: &Request) -> Self {
        let readable = request.readable.iter().map(|buffer| (buffer.len, false));
        let writable = request.writable.iter().map(|buffer| (buffer.len, true));
        // What a buffer of whole pages is followed by goes right behind it; what is short only if it is no status.
        let mut before = 0;
        let buffers = readable.chain(writable).map(|(len, writable)| {
            let continues = !writable && before > 0 && (before as usize).is_multiple_of(PAGE_SIZE);
            before = len;
            (len, writable, len < SMALL_BUFFER && !continues)
        });
        let buffers: SmallVec<[(u32, bool, bool); 4]> = buffers.collect();
        let small = |len: u32| (len as usize).next_multiple_of(SMALL_ALIGNMENT);
        let smalls = buffers.iter().filter(|(_, _, is_small)| *is_small);
        let smalls: usize = smalls.map(|(len, _, _)| small(*len)).sum();
        let (mut next_small, mut next_page) = (0, smalls.next_multiple_of(PAGE_SIZE));
        let parts = buffers.iter().map(|&(len, writable, is_small)| {
            let (next, step) = match is_small {
                true => (&mut next_small, small(len)),
                false => (&mut next_page, (len as usize).next_multiple_of(PAGE_SIZE)),
            };
            let place = *next;
            *next += step;
            Part {
                place,
                len,
                writable,
            }
        });
        let parts: SmallVec<[Part; 4]> = parts.collect();
        Self {
            descriptors: joined(&parts),
            parts,
            bytes: next_page,
            receives: request.readable.is_empty(),
        }
    }

    pub(super) fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }
}

/// The parts, those that follow whole pages and go the same way joined to these.
fn joined(parts: &[Part]) -> SmallVec<[Part; 4]> {
    let mut joined = SmallVec::<[Part; 4]>::new();
    for part in parts {
        let before = joined.last_mut();
        let whole_pages = before.filter(|before| {
            before.writable == part.writable
                && before.end() == part.place
                && (before.len as usize).is_multiple_of(PAGE_SIZE)
        });
        match whole_pages {
            Some(before) => before.len += part.len,
            None => joined.push(*part),
        }
    }
    joined
}

/// A request with its buffers in the region.
pub(super) struct Relaying {
    pub(super) request: Request,
    pub(super) plan: Plan,
    pub(super) run: PageRun,
    /// The pages are those that queues share.
    pub(super) is_shared: bool,
    /// Counts the requests of all queues, in the order in which they are offered.
    pub(super) order: u64,
    /// What the back-end says that it has written.
    pub(super) written: u32,
    /// Its descriptors in the shadow ring, once the back-end has used it.
    pub(super) descriptors: SmallVec<[u16; 4]>,
}

impl Relaying {
    /// Where a part is in the region.
    fn place(&self, part: &Part) -> std::ops::Range<usize> {
        let start = self.run.start() + part.place;
        start..start + part.len as usize
    }

    /// Bytes that may be written.
    pub(super) fn room(&self) -> usize {
        self.request.writable.len()
    }

    /// The first `len` bytes that may be read, or as many as there are.
    pub(super) fn readable(&self, len: usize, memory: &VolatileSlice<'_>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        for part in self.plan.parts.iter().filter(|part| !part.writable) {
            let place = self.place(part);
            let mut here = vec![0; place.len().min(len - bytes.len())];
            memory
                .read_slice(&mut here, place.start)
                .expect("in the region");
            bytes.append(&mut here);
        }
        bytes
    }

    /// Writes `bytes` behind the first `skip` that may be written, and zeros to those; the bytes from the first one to the
    /// last one that was written.
    pub(super) fn write(&self, skip: usize, bytes: &[u8], memory: &VolatileSlice<'_>) -> u32 {
        let zeros = std::iter::repeat_n(0, skip);
        let mut left = zeros.chain(bytes.iter().copied());
        let mut written = 0;
        for part in self.plan.parts.iter().filter(|part| part.writable) {
            let here: Vec<u8> = left.by_ref().take(part.len as usize).collect();
            memory
                .write_slice(&here, self.place(part).start)
                .expect("in the region");
            written += here.len();
        }
        u32::try_from(written).expect("what a request has room for")
    }

    /// Adds to `copies` what takes the readable buffers in, and short ones to write: what the back-end leaves as it is there
    /// is to come back so.
    pub(super) fn plan_in(&self, copies: &mut Vec<CopyOp>) {
        let buffers = self
            .request
            .readable
            .iter()
            .chain(self.request.writable.iter());
        for (buffer, part) in buffers.zip(&self.plan.parts) {
            if !part.writable || part.len < SMALL_BUFFER {
                let local = self.place(part);
                copies.push(CopyOp::new(Direction::FromGuest, buffer.address, local));
            }
        }
    }

    /// Adds to `copies` what takes to the guest what was written. Short buffers are taken as a whole: some back-ends write a
    /// status behind what they say that they have written, and no driver of a disk looks at that number.
    pub(super) fn plan_out(&self, copies: &mut Vec<CopyOp>) {
        let mut left = self.written;
        let writable = self.plan.parts.iter().filter(|part| part.writable);
        for (buffer, part) in self.request.writable.iter().zip(writable) {
            let written = part.len.min(left);
            left -= written;
            let len = match part.len < SMALL_BUFFER {
                true => part.len,
                false => written,
            };
            if len > 0 {
                let start = self.place(part).start;
                let local = start..start + len as usize;
                copies.push(CopyOp::new(Direction::ToGuest, buffer.address, local));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GuestBuffer;
    use vm_memory::GuestAddress;

    fn plan(readable: &[u32], writable: &[u32]) -> Plan {
        let mut request = Request::new(0);
        for (lens, buffers) in [
            (readable, &mut request.readable),
            (writable, &mut request.writable),
        ] {
            for len in lens {
                let pushed = buffers.push(GuestBuffer {
                    address: GuestAddress(0x1000),
                    len: *len,
                });
                pushed.unwrap();
            }
        }
        Plan::of(&request)
    }

    fn descriptors(plan: &Plan) -> Vec<(usize, u32, bool)> {
        let descriptors = plan.descriptors.iter();
        descriptors
            .map(|part| (part.place, part.len, part.writable))
            .collect()
    }

    /// A packet of Linux 6.12's virtio_vsock: a header, and pieces of 32 KiB.
    #[test]
    fn pieces_of_whole_pages_are_one_descriptor() {
        let plan = plan(&[44, 0x8000, 0x8000, 100], &[]);
        assert_eq!(plan.parts.len(), 4);
        assert_eq!(
            descriptors(&plan),
            [(0, 44, false), (0x1000, 0x10064, false)]
        );
        assert_eq!(plan.bytes, 0x1000 + 0x11000);
    }

    /// A request of Linux's virtio_blk: header, data, status.
    #[test]
    fn what_goes_another_way_or_begins_elsewhere_is_another_descriptor() {
        let reading = plan(&[16], &[0x1000, 0x1000, 0x200, 1]);
        let pages = (0x1000, 0x2200, true);
        assert_eq!(
            descriptors(&reading),
            [(0, 16, false), pages, (16, 1, true)]
        );
        let page = plan(&[16], &[0x1000, 1]);
        assert_eq!(descriptors(&page).len(), 3);
        let short = plan(&[16, 32], &[16]);
        assert_eq!(descriptors(&short).len(), 3);
        let both = plan(&[0x1000], &[0x1000]);
        assert_eq!(
            descriptors(&both),
            [(0, 0x1000, false), (0x1000, 0x1000, true)]
        );
    }
}
