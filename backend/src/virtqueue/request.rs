//! What a driver asks for: one descriptor chain, read once.

use super::queue::QueueError;
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;
use xen_virtio_guest_mapping::{CopyOp, Direction, PAGE_SIZE};

/// A piece of guest memory that a descriptor names. Its address is judged when it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestBuffer {
    pub address: GuestAddress,
    pub len: u32,
}

/// The device-readable or the device-writable buffers of a request, in order.
///
/// Their total fits in 32 bits: a longer chain is malformed (virtio 1.3, 2.7.5.2).
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    buffers: SmallVec<[GuestBuffer; 4]>,
    len: u32,
}

impl Buffers {
    /// Bytes in all buffers together.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers that are not empty, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &GuestBuffer> + Clone {
        self.buffers.iter()
    }

    fn clear(&mut self) {
        self.buffers.clear();
        self.len = 0;
    }

    pub(crate) fn push(&mut self, buffer: GuestBuffer) -> Option<()> {
        self.len = self.len.checked_add(buffer.len)?;
        if buffer.len > 0 {
            self.buffers.push(buffer);
        }
        Some(())
    }

    /// The first place from byte `at` of a memory of whole pages on from which a copy of these buffers crosses pages where its
    /// longest buffer does in the guest. Elsewhere each page of the guest's would be copied in two pieces.
    pub(crate) fn alike(&self, at: usize) -> usize {
        let mut skip = 0u64;
        let mut longest = GuestBuffer {
            address: GuestAddress(0),
            len: 0,
        };
        let mut begins = 0;
        for buffer in &self.buffers {
            if buffer.len > longest.len {
                longest = *buffer;
                begins = skip;
            }
            skip += u64::from(buffer.len);
        }
        let page = PAGE_SIZE as u64;
        let wanted = longest
            .address
            .0
            .wrapping_sub(begins)
            .wrapping_sub(at as u64)
            % page;
        at + usize::try_from(wanted).expect("less than a page")
    }

    /// Adds to `operations` what copies `len` bytes, from byte `skip` of these buffers on, to or from the
    /// local buffer at `local`. Bytes past the end are left out.
    pub fn copies(
        &self,
        direction: Direction,
        mut skip: usize,
        mut len: usize,
        mut local: usize,
        operations: &mut Vec<CopyOp>,
    ) {
        for buffer in &self.buffers {
            let here = buffer.len as usize;
            if skip >= here {
                skip -= here;
                continue;
            }
            let count = (here - skip).min(len);
            if count == 0 {
                return;
            }
            // The sum may wrap for a hostile descriptor; the policy judges the whole range of the copy.
            let address = GuestAddress(buffer.address.0.wrapping_add(skip as u64));
            operations.push(CopyOp::new(direction, address, local..local + count));
            skip = 0;
            len -= count;
            local += count;
        }
    }
}

/// A descriptor chain that the driver made available. It is finished by value: no other way leads to the
/// used ring.
#[derive(Debug)]
#[must_use = "a request that is not finished is never returned to the driver"]
pub struct Request {
    head: u16,
    is_repeated: bool,
    pub readable: Buffers,
    pub writable: Buffers,
}

/// Requests of more buffers than this are not kept for reuse: Linux sends at most 128, and a guest must not
/// make us hold memory that nobody uses.
const MAX_KEPT_BUFFERS: usize = 256;

impl Request {
    pub(crate) fn new(head: u16) -> Self {
        Self {
            head,
            is_repeated: false,
            readable: Buffers::default(),
            writable: Buffers::default(),
        }
    }

    /// What the driver knows it by.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// No process had taken it, as it has turned out.
    pub(crate) fn untouched(self) -> Self {
        Self {
            is_repeated: false,
            ..self
        }
    }

    /// Whether an earlier process had taken it, and may have carried out some or all of it.
    pub fn is_repeated(&self) -> bool {
        self.is_repeated
    }

    /// An earlier process had taken it.
    pub(crate) fn repeated(self) -> Self {
        Self {
            is_repeated: true,
            ..self
        }
    }

    /// Begins the request at `head` in the memory of an earlier one.
    pub(crate) fn reuse(mut self, head: u16) -> Self {
        self.head = head;
        self.is_repeated = false;
        self.readable.clear();
        self.writable.clear();
        self
    }

    pub(crate) fn is_worth_keeping(&self) -> bool {
        let kept = self.readable.buffers.capacity() + self.writable.buffers.capacity();
        kept <= MAX_KEPT_BUFFERS
    }

    /// Takes the chain's next descriptor in.
    pub(crate) fn add(&mut self, descriptor: Descriptor) -> Result<(), QueueError> {
        let buffer = GuestBuffer {
            address: descriptor.addr(),
            len: descriptor.len(),
        };
        let side = if descriptor.is_write_only() {
            &mut self.writable
        } else if self.writable.buffers.is_empty() && self.writable.len == 0 {
            &mut self.readable
        } else {
            // virtio 1.3, 2.7.4.2: device-readable descriptors come first.
            return Err(QueueError::ReadableAfterWritable { head: self.head });
        };
        side.push(buffer)
            .ok_or(QueueError::ChainTooLong { head: self.head })?;
        match self.readable.len.checked_add(self.writable.len) {
            Some(_) => Ok(()),
            None => Err(QueueError::ChainTooLong { head: self.head }),
        }
    }

    /// Ends the request: `written` bytes from the start of its writable buffers were filled.
    pub fn finish(self, written: usize) -> Completion {
        debug_assert!(written <= self.writable.len());
        Completion {
            head: self.head,
            written: u32::try_from(written).unwrap_or(self.writable.len),
            spent: self,
        }
    }
}

/// A finished request, for [`VirtQueue::complete`](crate::VirtQueue::complete).
#[derive(Debug)]
#[must_use = "a completion belongs on the used ring"]
pub struct Completion {
    pub(crate) head: u16,
    pub(crate) written: u32,
    /// The request that this is of, for its memory.
    pub(crate) spent: Request,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(lens: &[u32]) -> Buffers {
        let mut buffers = Buffers::default();
        for (index, &len) in lens.iter().enumerate() {
            buffers
                .push(GuestBuffer {
                    address: GuestAddress(0x1000 * (index as u64 + 1)),
                    len,
                })
                .unwrap();
        }
        buffers
    }

    fn copies(buffers: &Buffers, skip: usize, len: usize) -> Vec<(u64, std::ops::Range<usize>)> {
        let mut operations = Vec::new();
        buffers.copies(Direction::FromGuest, skip, len, 100, &mut operations);
        operations
            .into_iter()
            .map(|operation| (operation.guest.0, operation.local))
            .collect()
    }

    #[test]
    fn a_part_of_the_buffers_is_copied_in_order() {
        let buffers = buffers(&[16, 0, 8, 4]);
        assert_eq!(copies(&buffers, 0, 16), [(0x1000, 100..116)]);
        assert_eq!(
            copies(&buffers, 10, 10),
            [(0x100a, 100..106), (0x3000, 106..110)]
        );
        assert_eq!(copies(&buffers, 24, 4), [(0x4000, 100..104)]);
        assert_eq!(copies(&buffers, 27, 99), [(0x4003, 100..101)]);
        assert_eq!(copies(&buffers, 28, 1), []);
        assert_eq!(copies(&buffers, 0, 0), []);
    }

    #[test]
    fn a_copy_begins_where_its_longest_buffer_crosses_pages_as_the_guests_does() {
        let mut buffers = Buffers::default();
        for (address, len) in [(0x1ff0, 12), (0x5300, 8000), (0x9000, 100)] {
            let address = GuestAddress(address);
            buffers.push(GuestBuffer { address, len }).unwrap();
        }
        for at in [0, 1, 0x2f4, 0x2f5, 0xfff, 0x1000, 0x12345] {
            let place = buffers.alike(at);
            assert!((at..at + 0x1000).contains(&place), "{at:#x}");
            assert_eq!((place + 12) % 0x1000, 0x300, "{at:#x}");
        }
        assert_eq!(Buffers::default().alike(5), 0x1000);
    }

    #[test]
    fn four_gibibytes_in_one_chain_are_too_many() {
        let mut buffers = buffers(&[u32::MAX]);
        assert!(
            buffers
                .push(GuestBuffer {
                    address: GuestAddress(0),
                    len: 1
                })
                .is_none()
        );
    }
}
