//! A split virtqueue (virtio 1.3, 2.7) whose rings are mapped from the guest.

use super::journal::{JournalError, QueueJournal, RecoveredPositions};
use super::request::{Completion, Request};
use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use xen_virtio_guest_mapping::{AccessError, GuestAccess, Permissions, RingMemory};

/// The largest virtqueue that a device may offer: what [`MAX_RING_PAGES`] has room for.
///
/// [`MAX_RING_PAGES`]: xen_virtio_guest_mapping::MAX_RING_PAGES
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// A queue that the device has: the register file makes it, and only of a number below the device's
/// count of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(u16);

impl QueueIndex {
    /// The queue of this number, if a device with `count` queues has it.
    pub fn new(number: u32, count: usize) -> Option<Self> {
        let number = u16::try_from(number).ok()?;
        (usize::from(number) < count).then_some(Self(number))
    }

    pub fn get(self) -> usize {
        self.0.into()
    }
}

/// Where a driver put a queue, as its registers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries in each of the three areas.
    pub size: u16,
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

/// What a driver got wrong about a queue. The queue is dead until the driver resets the device.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("queue size {0} is not a power of two up to {MAX_QUEUE_SIZE}")]
    Size(u16),
    #[error("the queue's {area} area at {address:#x} is not aligned to {alignment} bytes")]
    Alignment {
        area: &'static str,
        address: u64,
        alignment: u64,
    },
    #[error("the queue's {area} area cannot be mapped")]
    Map {
        area: &'static str,
        source: AccessError,
    },
    #[error("the available ring's index is further ahead than the queue is long")]
    AvailableIndex,
    #[error("the driver made the descriptor chain at {head} available again before it had it back")]
    HeadInUse { head: u16 },
    #[error("the descriptor chain at {head} names descriptor {index} of a table of {size}")]
    DescriptorIndex { head: u16, index: u16, size: u16 },
    #[error("the descriptor chain at {head} has more descriptors than its table: it loops")]
    ChainLoops { head: u16 },
    #[error("the descriptor chain at {head} is longer than 2^32 bytes")]
    ChainTooLong { head: u16 },
    #[error("the descriptor chain at {head} has a readable descriptor after a writable one")]
    ReadableAfterWritable { head: u16 },
    #[error("the descriptor chain at {head} uses an indirect table, which was not negotiated")]
    Indirect { head: u16 },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the queue's rings are not usable")]
    Ring(#[from] virtio_queue::Error),
    #[error("the queue's rings are not readable")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl QueueError {
    /// Whether dom0 lacked something, and the driver did nothing wrong.
    pub fn is_dom0s(&self) -> bool {
        matches!(self, Self::Map { source, .. } if source.is_dom0s())
    }

    /// Whether dom0 may have lacked something: a few more tries tell.
    pub fn may_be_dom0s(&self) -> bool {
        matches!(self, Self::Map { source, .. } if source.may_be_dom0s())
    }
}

/// What becomes of requests that a process had taken, and not finished when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// They are carried out again: what of it was done may be done twice.
    Repeat,
    /// The driver has them back at once, with nothing written.
    GiveBack,
}

/// A running virtqueue. Every descriptor is read once; what came of it is in the [`Request`].
pub struct VirtQueue {
    queue: Queue,
    rings: RingMemory,
    journal: QueueJournal,
    /// The next element of the available ring to take, as the journal counts.
    next_available: u64,
    /// Heads that an earlier process took, and did not finish.
    unfinished: VecDeque<u16>,
    /// The next element of the used ring to fill. Those from `published` on the driver does not see yet.
    next_used: u64,
    published: u64,
    /// The driver has been asked to kick, and nothing was taken from the queue since.
    kicks_resumed: bool,
    /// Requests that were completed, whose memory the next ones use.
    spent: Vec<Request>,
}

impl VirtQueue {
    /// Maps the rings of a queue and goes on where `journal` says: at their beginning if it is empty. What
    /// an earlier process had taken and not finished is popped first, or given back, as `unfinished` says.
    ///
    /// # Errors
    ///
    /// [`QueueError`] for a size, an alignment or an address that cannot be.
    pub fn map(
        layout: QueueLayout,
        event_idx: bool,
        journal: QueueJournal,
        unfinished: Unfinished,
        access: &mut dyn GuestAccess,
    ) -> Result<Self, QueueError> {
        let QueueLayout {
            size,
            descriptors,
            available,
            used,
        } = layout;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size));
        }
        let entries = usize::from(size);
        let mut map = |area, address: GuestAddress, len, alignment, permissions| {
            if !address.0.is_multiple_of(alignment) {
                return Err(QueueError::Alignment {
                    area,
                    address: address.0,
                    alignment,
                });
            }
            access
                .map_ring(address, len, permissions)
                .map_err(|source| QueueError::Map { area, source })
        };
        // Sizes and alignments: virtio 1.3, 2.7.
        let rings = map("used", used, 6 + 8 * entries, 4, Permissions::ReadWrite)?
            .join(map(
                "descriptor",
                descriptors,
                16 * entries,
                16,
                Permissions::Read,
            )?)
            .join(map(
                "available",
                available,
                6 + 2 * entries,
                2,
                Permissions::Read,
            )?);
        let mut queue = Queue::new(MAX_QUEUE_SIZE)?;
        queue.try_set_size(size)?;
        queue.try_set_desc_table_address(descriptors)?;
        queue.try_set_avail_ring_address(available)?;
        queue.try_set_used_ring_address(used)?;
        queue.set_event_idx(event_idx);
        let recovered = journal.recover(size)?;
        queue.set_next_avail(ring_index(recovered.available));
        queue.set_ready(true);
        let RecoveredPositions {
            used,
            available,
            taken,
            unpublished,
        } = recovered;
        let mut queue = Self {
            queue,
            rings,
            journal,
            next_available: available,
            unfinished: taken.into(),
            next_used: used,
            published: used,
            // A driver's own first state: it kicks for the first entry (virtio 1.3, 2.7.10).
            kicks_resumed: available == 0,
            spent: Vec::new(),
        };
        if unfinished == Unfinished::GiveBack {
            for head in std::mem::take(&mut queue.unfinished) {
                queue.complete(Request::new(head).finish(0))?;
            }
        }
        if unpublished || queue.next_used != queue.published {
            queue.show_used()?;
        }
        Ok(queue)
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How many requests were completed since the queue started, those of earlier processes among them.
    pub fn completed(&self) -> u64 {
        self.next_used
    }

    /// How many requests wait to be popped. What the driver's index cannot be, [`VirtQueue::pop`] tells.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`] if the ring cannot be read.
    pub fn available(&self) -> Result<usize, QueueError> {
        let index = self.queue.avail_idx(&self.rings, Ordering::Relaxed)?;
        let waiting = index - Wrapping(self.queue.next_avail());
        Ok(self.unfinished.len() + usize::from(waiting.0))
    }

    /// The next request that the driver made available, if there is one. While requests are taken the
    /// driver is asked not to kick: [`VirtQueue::resume_kicks`] ends that.
    ///
    /// # Errors
    ///
    /// [`QueueError`] for a ring or a chain that the specification forbids.
    pub fn pop(&mut self) -> Result<Option<Request>, QueueError> {
        let unfinished = self.unfinished.pop_front();
        let head = match unfinished {
            Some(head) => head,
            None => match self.take_available()? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        if std::mem::take(&mut self.kicks_resumed) {
            self.queue.disable_notification(&self.rings)?;
        }
        let request = self.read_chain(head)?;
        Ok(Some(match unfinished {
            Some(_) => request.repeated(),
            None => request,
        }))
    }

    /// Takes the next head off the available ring, if there is one.
    fn take_available(&mut self) -> Result<Option<u16>, QueueError> {
        let mut available = self.queue.iter(&self.rings).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::AvailableIndex,
            error => QueueError::Ring(error),
        })?;
        let Some(chain) = available.next() else {
            return Ok(None);
        };
        let (head, size) = (chain.head_index(), self.queue.size());
        if head >= size {
            let index = head;
            return Err(QueueError::DescriptorIndex { head, index, size });
        }
        if self.journal.has(head) {
            return Err(QueueError::HeadInUse { head });
        }
        self.journal.take(head, self.next_available);
        self.next_available += 1;
        Ok(Some(head))
    }

    fn read_chain(&mut self, head: u16) -> Result<Request, QueueError> {
        let size = self.queue.size();
        let mut request = match self.spent.pop() {
            Some(spent) => spent.reuse(head),
            None => Request::new(head),
        };
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(QueueError::DescriptorIndex { head, index, size });
            }
            let address =
                GuestAddress(self.queue.desc_table()).unchecked_add(16 * u64::from(index));
            let descriptor: Descriptor = self.rings.read_obj(address)?;
            if u32::from(descriptor.flags()) & VRING_DESC_F_INDIRECT != 0 {
                return Err(QueueError::Indirect { head });
            }
            request.add(descriptor)?;
            if !descriptor.has_next() {
                return Ok(request);
            }
            index = descriptor.next();
        }
        Err(QueueError::ChainLoops { head })
    }

    /// Puts a finished request on the used ring, where the driver finds it after the next
    /// [`VirtQueue::publish`].
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the ring cannot be written.
    pub fn complete(&mut self, completion: Completion) -> Result<(), QueueError> {
        let Completion {
            head,
            written,
            spent,
        } = completion;
        // virtio 1.3, 2.7.8: `le16 flags`, `le16 idx`, then elements of `le32 id`, `le32 len`.
        let slot = self.next_used % u64::from(self.queue.size());
        let element = u64::from(written) << 32 | u64::from(head);
        let address = GuestAddress(self.queue.used_ring()).unchecked_add(4 + 8 * slot);
        self.rings.write_obj(element.to_le(), address)?;
        self.journal.done(head, self.next_used);
        self.next_used += 1;
        if spent.is_worth_keeping() {
            self.spent.push(spent);
        }
        Ok(())
    }

    /// Shows the driver what was completed since the last time. True if it wants an interrupt for that.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the rings cannot be read or written.
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        let old = Wrapping(ring_index(self.published));
        let new = Wrapping(ring_index(self.next_used));
        if old == new {
            return Ok(false);
        }
        self.show_used()?;
        // The driver sees the index before we read its wish, or we see the wish that it wrote after reading
        // the index: it then looks once more.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        if self.queue.event_idx_enabled() {
            // virtio 1.3, 2.7.7.2: an interrupt if the entry that `used_event` names is among the new ones.
            let place = available.unchecked_add(4 + 2 * u64::from(self.queue.size()));
            let used_event = Wrapping(u16::from_le(self.rings.load(place, Ordering::Relaxed)?));
            Ok(new - used_event - Wrapping(1) < new - old)
        } else {
            // virtio 1.3, 2.7.7: without EVENT_IDX the driver's flag decides.
            let flags = u16::from_le(self.rings.load(available, Ordering::Relaxed)?);
            Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Sets the used ring's index.
    fn show_used(&mut self) -> Result<(), QueueError> {
        let new = ring_index(self.next_used);
        self.queue.set_next_used(new);
        let index = GuestAddress(self.queue.used_ring()).unchecked_add(2);
        self.rings.store(new.to_le(), index, Ordering::Release)?;
        self.published = self.next_used;
        self.journal.publish(self.published);
        Ok(())
    }

    /// Asks the driver to kick again, if it was asked not to. True if it made something available
    /// meanwhile, which it then will not kick for.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`] if the ring cannot be read or written.
    pub fn resume_kicks(&mut self) -> Result<bool, QueueError> {
        if self.kicks_resumed {
            return Ok(false);
        }
        self.kicks_resumed = true;
        Ok(self.queue.enable_notification(&self.rings)?)
    }
}

/// The index in a ring of the element that the journal counts as `position`.
fn ring_index(position: u64) -> u16 {
    let [low, high, ..] = position.to_le_bytes();
    u16::from_le_bytes([low, high])
}
