//! The block device (virtio 1.3, 5.2).

mod coalescer;
mod config;
mod disk;
mod header;
// Hands memory to the kernel for as long as a transfer takes.
mod blk_request;
#[allow(unsafe_code)]
mod io;
mod pipeline;
mod pool;
mod ring;
mod stopwatch;

pub use disk::{Disk, DiskError, SECTOR};
pub use pipeline::Claim;
pub use ring::RingStock;

use crate::device::{
    Activity, Device, DeviceCounters, DeviceError, DeviceFailure, DeviceType, QueueSetup, Step,
};
use crate::journal::QueueJournal;
use crate::persist::StateArea;
use crate::queue::{MAX_QUEUE_SIZE, QueueError, QueueIndex, VirtQueue};
use coalescer::Coalescer;
use pipeline::Pipeline;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

const _: () = assert!(Blk::QUEUE_SIZE <= MAX_QUEUE_SIZE);

/// Queues that one disk may have.
pub const MAX_QUEUES: u16 = 16;

/// Requests of a disk that are under way at once, of all its queues; the others wait in theirs.
const MAX_REQUESTS: u16 = 128;

/// Requests that are taken at once: enough to share the cost of a call, and no more, so that a guest with a
/// deep queue prepares the next ones, and handles the last, while these are under way.
const BATCH: usize = 32;

/// Steps for which results wait for more to be delivered with: some microseconds, whatever the disk does
/// with the others.
const HELD_STEPS: u32 = 64;

/// What `VIRTIO_BLK_T_GET_ID` returns, padded with zeros.
pub type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// A disk for a guest.
pub struct Blk {
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    queues: Vec<Option<ActiveQueue>>,
    /// The queue that requests are taken from first, so that none is always last.
    first_queue: usize,
    pipeline: Pipeline,
    coalescer: Coalescer,
    /// Steps for which something that has ended is being held back.
    held: u32,
}

/// A queue between start and stop.
struct ActiveQueue {
    queue: VirtQueue,
    /// Whether the driver flushes. One that does not expects a write to be stable when it is done
    /// (virtio 1.3, 5.2.6.2).
    driver_flushes: bool,
}

impl Blk {
    /// Bytes of the state that a disk keeps beyond its process.
    pub const KEPT: usize = 16;

    /// The largest size of each of its queues.
    pub const QUEUE_SIZE: u16 = 512;

    /// A device for `disk` with `queues` queues, at least one and at most [`MAX_QUEUES`]. `kept`
    /// ([`Blk::KEPT`] bytes) remembers a failed flush beyond this process. The disk has a ring of `rings` while it lives;
    /// without one it does one transfer after the other.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(
        disk: Disk,
        serial: Serial,
        queues: u16,
        kept: StateArea,
        rings: &RingStock,
    ) -> std::io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        Ok(Self {
            config: config::config_space(&disk, queues),
            queue_sizes: vec![Self::QUEUE_SIZE; queues.into()],
            queues: (0..queues).map(|_| None).collect(),
            first_queue: 0,
            pipeline: Pipeline::new(disk, serial, kept, rings)?,
            coalescer: Coalescer::default(),
            held: 0,
        })
    }

    /// Has nothing begun before `claim` has taken the disk; registers are answered meanwhile.
    pub fn claim_first(&mut self, claim: Claim) {
        self.pipeline.claim_first(claim);
    }

    /// How many requests wait in the queues.
    fn available(&mut self) -> Result<usize, DeviceError> {
        let mut count = 0;
        for (index, active) in started(&mut self.queues) {
            count += active.queue.available().map_err(of_queue(index))?;
        }
        Ok(count)
    }

    /// Takes the next batch of requests off the queues. True if there was any.
    fn gather(&mut self, access: &dyn GuestAccess) -> Result<bool, DeviceError> {
        let mut room = self
            .pipeline
            .room()
            .min(self.coalescer.batch(access.mode()));
        let full = room;
        let count = self.queues.len();
        for step in 0..count {
            let index = (self.first_queue + step) % count;
            let Some(active) = &mut self.queues[index] else {
                continue;
            };
            while room > 0 {
                let popped = active.queue.pop().map_err(of_queue(index))?;
                let Some(request) = popped else { break };
                room -= 1;
                self.pipeline
                    .admit(index, request, !active.driver_flushes)
                    .map_err(|failure| failure.of(index))?;
            }
        }
        self.first_queue = (self.first_queue + 1) % count;
        Ok(room < full)
    }

    /// How busy the device is when it has found nothing to do.
    fn activity(&self) -> Activity {
        if self.pipeline.is_waiting() {
            Activity::Waiting
        } else {
            Activity::Idle
        }
    }

    /// Gives the driver what has ended. True if it wants an interrupt for it.
    fn deliver(&mut self, access: &mut dyn GuestAccess) -> Result<bool, DeviceError> {
        self.held = 0;
        let before = self.pipeline.counters();
        let Self {
            queues, pipeline, ..
        } = self;
        let delivered = pipeline.deliver(access, |index, completion| {
            let active = queues[index].as_mut();
            let queue = &mut active.expect("a request outlives not its queue").queue;
            queue.complete(completion).map_err(of_queue(index))
        });
        let after = pipeline.counters();
        let bytes = |counters: &DeviceCounters| counters.read_bytes + counters.written_bytes;
        let count = usize::try_from(after.requests - before.requests).unwrap_or(usize::MAX);
        self.coalescer
            .delivered(count, bytes(&after) - bytes(&before));
        // What was completed before a failure is the driver's.
        let mut interrupt = false;
        for (index, active) in started(queues) {
            interrupt |= active.queue.publish().map_err(of_queue(index))?;
        }
        delivered.map(|()| interrupt)
    }
}

fn started(queues: &mut [Option<ActiveQueue>]) -> impl Iterator<Item = (usize, &mut ActiveQueue)> {
    queues
        .iter_mut()
        .enumerate()
        .filter_map(|(index, queue)| Some((index, queue.as_mut()?)))
}

fn of_queue(index: usize) -> impl Fn(QueueError) -> DeviceError {
    move |error| DeviceFailure::from(error).of(index)
}

impl Device for Blk {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.queues.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.pipeline.disk().read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: QueueSetup,
        journal: QueueJournal,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        let queue = VirtQueue::map(
            setup.layout,
            setup.has_feature(VIRTIO_RING_F_EVENT_IDX),
            journal,
            access,
        )?;
        self.queues[index.get()] = Some(ActiveQueue {
            queue,
            driver_flushes: setup.has_feature(VIRTIO_BLK_F_FLUSH),
        });
        Ok(())
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let ended = self.pipeline.gather_ended();
        let available = self.available()?;
        let take = self.coalescer.step(available, self.pipeline.len());
        self.held += u32::from(self.pipeline.has_ended());
        if self.pipeline.is_due() || self.held > HELD_STEPS {
            return Ok(Step {
                interrupt: self.deliver(access)?,
                activity: Activity::Working,
            });
        }
        let begun = self.pipeline.submit()
            || (take && self.gather(access)?) | self.pipeline.copy_in(access);
        // Nothing tells of requests that wait for more, and they do not wait for long.
        let waits = available > 0 && !take && !self.pipeline.is_waiting();
        Ok(Step {
            interrupt: false,
            activity: if ended || begun || waits {
                Activity::Working
            } else {
                self.activity()
            },
        })
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        if self.pipeline.has_ended() {
            return Ok(Step {
                interrupt: self.deliver(access)?,
                activity: Activity::Working,
            });
        }
        let mut more = self.pipeline.must_submit();
        // Without room, a kick would tell of what cannot be taken; the end of a transfer makes room.
        if self.pipeline.room() > 0 {
            for (index, active) in started(&mut self.queues) {
                more |= active.queue.resume_kicks().map_err(of_queue(index))?;
            }
            // Those that wait for more do not wait for the disk: nothing else may tell of them.
            more |= self.available()? > 0;
        }
        Ok(Step {
            interrupt: false,
            activity: if more {
                Activity::Working
            } else {
                self.activity()
            },
        })
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        self.pipeline.events()
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        if self.queues[index.get()].take().is_some() {
            self.pipeline.forget(index.get());
        }
    }

    fn retire(&mut self) {
        self.pipeline.retire();
    }

    fn settle(&mut self) -> bool {
        self.pipeline.gather_ended();
        self.pipeline.is_settled()
    }

    fn reset(&mut self) {
        self.pipeline.reset();
    }

    fn resize(&mut self, bytes: u64) -> bool {
        self.pipeline.resize(bytes);
        let queues = u16::try_from(self.queues.len()).expect("at most MAX_QUEUES");
        let config = config::config_space(self.pipeline.disk(), queues);
        let changed = config != self.config;
        self.config = config;
        changed
    }

    fn try_again_at(&self) -> Option<Instant> {
        self.pipeline.try_again_at()
    }

    fn warning(&self) -> Option<String> {
        if let Some(warning) = self.pipeline.shortage() {
            return Some(warning);
        }
        let (error, holds) = self.pipeline.flush_error()?;
        let since = if holds {
            "flushes fail until the driver resets the device (a reboot of the guest)"
        } else {
            "a new driver has begun since"
        };
        Some(format!(
            "a flush has failed ({error}): what was written before it may be lost, and the driver was told; {since}"
        ))
    }

    fn counters(&self) -> DeviceCounters {
        self.pipeline.counters()
    }
}
