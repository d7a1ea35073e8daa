//! The block device (virtio 1.3, 5.2).

mod config;
mod disk;
mod header;
mod job;

pub use disk::{Disk, DiskError, SECTOR};

use crate::device::{Device, DeviceCounters, DeviceError, DeviceType, QueueSetup, Turn};
use crate::queue::{MAX_QUEUE_SIZE, QueueError, QueueIndex, VirtQueue};
use job::{BUFFER, Job, Round};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

const QUEUE_SIZE: u16 = 512;
const _: () = assert!(QUEUE_SIZE <= MAX_QUEUE_SIZE);

/// Queues that one disk may have.
pub const MAX_QUEUES: u16 = 16;

/// Requests in one round: what is copied in one batch.
const ROUND_REQUESTS: usize = 64;
/// Rounds in one turn, before other devices and the guest's traps have theirs.
const TURN_ROUNDS: usize = 4;

/// What `VIRTIO_BLK_T_GET_ID` returns, padded with zeros.
pub type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// A disk for a guest.
pub struct Blk {
    disk: Disk,
    serial: Serial,
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    queues: Vec<Option<ActiveQueue>>,
    round: Round,
    counters: DeviceCounters,
}

/// A queue between start and stop.
struct ActiveQueue {
    queue: VirtQueue,
    /// Popped and not finished: larger than a round has room for, or for the next round.
    jobs: Vec<Job>,
    /// Whether the driver flushes. One that does not expects a write to be stable when it is done
    /// (virtio 1.3, 5.2.6.2).
    driver_flushes: bool,
}

impl Blk {
    /// A device for `disk` with `queues` queues, at least one and at most [`MAX_QUEUES`].
    pub fn new(disk: Disk, serial: Serial, queues: u16) -> Self {
        let queues = queues.clamp(1, MAX_QUEUES);
        Self {
            config: config::config_space(&disk, queues),
            disk,
            serial,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            queues: (0..queues).map(|_| None).collect(),
            round: Round::new(),
            counters: DeviceCounters::default(),
        }
    }
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
        if self.disk.read_only() {
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
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        let queue = VirtQueue::map(
            setup.layout,
            setup.has_feature(VIRTIO_RING_F_EVENT_IDX),
            access,
        )?;
        let driver_flushes = setup.has_feature(VIRTIO_BLK_F_FLUSH);
        self.queues[index.get()] = Some(ActiveQueue {
            queue,
            jobs: Vec::new(),
            driver_flushes,
        });
        Ok(())
    }

    fn process(
        &mut self,
        index: QueueIndex,
        access: &mut dyn GuestAccess,
    ) -> Result<Turn, DeviceError> {
        let Some(active) = &mut self.queues[index.get()] else {
            return Ok(Turn::default());
        };
        let mut more = true;
        active.queue.suspend_kicks()?;
        for _ in 0..TURN_ROUNDS {
            active.gather()?;
            if active.jobs.is_empty() && !active.queue.resume_kicks()? {
                more = false;
                break;
            }
            let ActiveQueue {
                queue,
                jobs,
                driver_flushes,
            } = active;
            self.round.run(
                jobs,
                &self.disk,
                &self.serial,
                access,
                *driver_flushes,
                &mut self.counters,
            )?;
            for job in jobs.extract_if(.., |job| job.is_finished()) {
                queue.complete(job.into_completion())?;
            }
        }
        Ok(Turn {
            interrupt: active.queue.needs_interrupt()?,
            more,
        })
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues[index.get()] = None;
    }

    fn counters(&self) -> DeviceCounters {
        self.counters
    }
}

impl ActiveQueue {
    /// Pops as many requests as a round has room for.
    fn gather(&mut self) -> Result<(), DeviceError> {
        let mut room = BUFFER.saturating_sub(self.jobs.iter().map(Job::room).sum());
        while self.jobs.len() < ROUND_REQUESTS && room > 0 {
            let Some(request) = self.queue.pop()? else {
                break;
            };
            let job = Job::new(request)?;
            room = room.saturating_sub(job.room());
            self.jobs.push(job);
        }
        Ok(())
    }
}
