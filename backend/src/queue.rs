//! A split virtqueue (virtio 1.3, 2.7) whose rings are mapped from the guest.

use crate::request::{Completion, Request};
use std::sync::atomic::Ordering;
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
    #[error("the queue's rings are not usable")]
    Ring(#[from] virtio_queue::Error),
    #[error("the queue's rings are not readable")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A running virtqueue. Every descriptor is read once; what came of it is in the [`Request`].
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    rings: RingMemory,
    /// Something was completed since the driver's wish for an interrupt was last asked for.
    completed: bool,
}

impl VirtQueue {
    /// Maps the rings of a queue and starts at its first entry.
    ///
    /// # Errors
    ///
    /// [`QueueError`] for a size, an alignment or an address that cannot be.
    pub fn map(
        layout: QueueLayout,
        event_idx: bool,
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
        queue.set_ready(true);
        Ok(Self {
            queue,
            rings,
            completed: false,
        })
    }

    /// The next request that the driver made available, if there is one.
    ///
    /// # Errors
    ///
    /// [`QueueError`] for a ring or a chain that the specification forbids.
    pub fn pop(&mut self) -> Result<Option<Request>, QueueError> {
        let head = {
            let mut available = self.queue.iter(&self.rings).map_err(|error| match error {
                virtio_queue::Error::InvalidAvailRingIndex => QueueError::AvailableIndex,
                error => QueueError::Ring(error),
            })?;
            match available.next() {
                Some(chain) => chain.head_index(),
                None => return Ok(None),
            }
        };
        self.read_chain(head).map(Some)
    }

    fn read_chain(&self, head: u16) -> Result<Request, QueueError> {
        let size = self.queue.size();
        let mut request = Request::new(head);
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

    /// Puts a finished request on the used ring.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`] if the ring cannot be written.
    pub fn complete(&mut self, completion: Completion) -> Result<(), QueueError> {
        self.completed = true;
        Ok(self
            .queue
            .add_used(&self.rings, completion.head, completion.written)?)
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the ring cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.completed) || !self.queue.needs_notification(&self.rings)? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // virtio 1.3, 2.7.7: without EVENT_IDX the driver's flag decides.
        let flags: u16 = self
            .rings
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick: we are looking anyway.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`] if the ring cannot be written.
    pub fn suspend_kicks(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&self.rings)?)
    }

    /// Asks the driver to kick again. True if it made something available meanwhile, which it then will
    /// not kick for.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`] if the ring cannot be read or written.
    pub fn resume_kicks(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&self.rings)?)
    }
}
