//! The block device (virtio 1.3, 5.2).

mod blk_request;
mod config;
mod counters;
mod disk;
mod header;
mod io;
mod pipeline;

pub use disk::{Caching, Disk, DiskError, Erases, SECTOR, Topology};
pub use pipeline::Claim;

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Coalescer, Limiter, Limits, RingStock};
use crate::persist::StateArea;
use crate::tuning::HELD_STEPS;
use crate::virtqueue::{MAX_QUEUE_SIZE, QueueError, QueueIndex, QueueSet, QueueStart, Unfinished};
use counters::Counters;
use pipeline::Pipeline;
use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

const _: () = assert!(Blk::QUEUE_SIZE <= MAX_QUEUE_SIZE);

/// Queues that one disk may have.
pub const MAX_QUEUES: u16 = 16;

/// What `VIRTIO_BLK_T_GET_ID` returns, padded with zeros.
pub type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// A disk for a guest.
pub struct Blk {
    identity: Identity,
    config: Vec<u8>,
    queues: QueueSet,
    /// The queue that requests are taken from first, so that none is always last.
    first_queue: usize,
    capacity: Capacity,
    pipeline: Pipeline,
    coalescer: Coalescer,
    limiter: Limiter,
    /// Where it is remembered whether the driver has turned the write cache off, if it may.
    cache: Option<WriteCache>,
    /// Steps for which something that has ended is being held back.
    held: u32,
}

/// Whether a driver that may choose has turned the write cache off (virtio 1.3, 5.2.5.2).
struct WriteCache(StateArea);

impl WriteCache {
    /// Its word of what a disk keeps. Zero is on: what a reset leaves, and an earlier version.
    const IS_OFF: usize = 2;

    fn is_on(&self) -> bool {
        self.0.load(Self::IS_OFF) == 0
    }

    fn turn(&self, is_on: bool) {
        self.0.store(Self::IS_OFF, u64::from(!is_on));
    }
}

/// The bytes of a disk that its driver is to see: changed from outside, and taken up by the disk's next
/// [`Device::update`]. A clone is of the same disk.
#[derive(Clone, Debug)]
pub struct Capacity(Rc<Cell<u64>>);

impl Capacity {
    pub fn set(&self, bytes: u64) {
        self.0.set(bytes);
    }

    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

impl Blk {
    /// Bytes of the state that a disk keeps beyond its process.
    pub const KEPT: usize = 24;

    /// As many as a version kept that did not let its driver turn the write cache off: with these, no driver may.
    pub const KEPT_BEFORE: usize = 16;

    /// The largest size of each of its queues.
    pub const QUEUE_SIZE: u16 = 512;

    /// A device for `disk` with `queues` queues, at least one and at most [`MAX_QUEUES`]. `kept` ([`Blk::KEPT`] or
    /// [`Blk::KEPT_BEFORE`] bytes) remembers a failed flush, and what the driver has set, beyond this process. The disk has a
    /// ring of `rings` while it lives; without one it does one transfer after the other.
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
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if disk.erases().discards {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
        if disk.erases().zeroes {
            features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        if disk.topology().is_some() {
            features |= 1 << VIRTIO_BLK_F_TOPOLOGY;
        }
        let cache = (kept.len() >= Self::KEPT).then(|| WriteCache(kept.clone()));
        if cache.is_some() {
            features |= 1 << VIRTIO_BLK_F_CONFIG_WCE;
        }
        Ok(Self {
            cache,
            limiter: Limiter::new(Limits::default()),
            identity: Identity {
                device_type: DeviceType::BLOCK,
                features,
                queue_sizes: vec![Self::QUEUE_SIZE; queues.into()],
            },
            config: config::config_space(&disk, queues),
            queues: QueueSet::new(queues.into()),
            first_queue: 0,
            capacity: Capacity(Rc::new(Cell::new(disk.bytes()))),
            pipeline: Pipeline::new(disk, serial, kept, rings)?,
            coalescer: Coalescer::default(),
            held: 0,
        })
    }

    /// What sets the disk's size from now on.
    pub fn capacity(&self) -> Capacity {
        self.capacity.clone()
    }

    /// Holds the driver to `limits`, of the bytes that requests have beside their headers.
    pub fn limit(&mut self, limits: Limits) {
        self.limiter = Limiter::new(limits);
    }

    /// Has nothing begun before `claim` has taken the disk; registers are answered meanwhile.
    pub fn claim_first(&mut self, claim: Claim) {
        self.pipeline.claim_first(claim);
    }

    /// Takes the next batch of requests off the queues. True if there was any.
    fn gather(&mut self, access: &dyn GuestAccess) -> Result<bool, DeviceError> {
        let mut room = self
            .pipeline
            .room()
            .min(self.coalescer.batch(access.mode()));
        let full = room;
        let count = self.queues.count();
        for step in 0..count {
            let index = (self.first_queue + step) % count;
            let Some(queue) = self.queues.get(index) else {
                continue;
            };
            // A driver that does not flush, or has turned the write cache off, expects a write to be stable when it is done
            // (virtio 1.3, 5.2.6.2).
            let is_off = self.cache.as_ref().is_some_and(|cache| !cache.is_on());
            let write_through = !queue.has_feature(VIRTIO_BLK_F_FLUSH)
                || queue.has_feature(VIRTIO_BLK_F_CONFIG_WCE) && is_off;
            while room > 0 && self.limiter.admits() {
                let Some(request) = queue.pop()? else { break };
                room -= 1;
                self.limiter
                    .spend(request.readable.len() + request.writable.len());
                self.pipeline
                    .admit(index, request, write_through)
                    .map_err(|failure| failure.of(index))?;
            }
        }
        self.first_queue = (self.first_queue + 1) % count;
        Ok(room < full)
    }

    /// How many requests wait that may be taken now.
    fn available(&mut self) -> Result<usize, DeviceError> {
        match self.limiter.admits() {
            true => self.queues.available(),
            false => Ok(0),
        }
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
        let delivered = pipeline.deliver(access, |index, request| {
            let queue = queues.get(index).expect("a request outlives not its queue");
            let detail = queue.is_traced().then(|| request.detail());
            queue.complete_with(request.into_completion(), detail)
        });
        let after = pipeline.counters();
        let bytes = |counters: &Counters| counters.read_bytes + counters.written_bytes;
        let count = usize::try_from(after.requests - before.requests).unwrap_or(usize::MAX);
        self.coalescer
            .delivered(count, bytes(&after) - bytes(&before));
        // What was completed before a failure is the driver's.
        let interrupt = queues.publish()?;
        delivered.map(|()| interrupt)
    }
}

impl Device for Blk {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        read_space(&self.config, offset, to);
        if let Some(cache) = &self.cache
            && let Some(at) = config::WRITE_BACK.checked_sub(offset)
            && let Some(byte) = to.get_mut(at)
        {
            *byte = cache.is_on().into();
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Some(cache) = &self.cache
            && let Some(at) = config::WRITE_BACK.checked_sub(offset)
            && let Some(byte) = data.get(at)
        {
            cache.turn(*byte != 0);
        }
    }

    fn update(&mut self) -> bool {
        let bytes = self.capacity.0.get();
        if self.pipeline.disk().bytes() == bytes {
            return false;
        }
        self.pipeline.resize(bytes);
        let queues = u16::try_from(self.queues.count()).expect("at most MAX_QUEUES");
        let config = config::config_space(self.pipeline.disk(), queues);
        let changed = config != self.config;
        self.config = config;
        changed
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        // What was done of a read, a write or a flush may be done twice.
        self.queues.start(index, start, Unfinished::Repeat, access)
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
                ..Step::default()
            });
        }
        let begun = self.pipeline.submit()
            || (take && self.gather(access)?) | self.pipeline.copy_in(access);
        // Nothing tells of requests that wait for more, and they do not wait for long.
        let waits = available > 0 && !take && !self.pipeline.is_waiting();
        Ok(Step {
            interrupt: false,
            config_changed: false,
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
                ..Step::default()
            });
        }
        let mut more = self.pipeline.must_submit();
        // Without room, a kick would tell of what cannot be taken; the end of a transfer makes room.
        // Nor would one of what may not be taken yet.
        if self.pipeline.room() > 0 && self.limiter.admits() {
            more |= self.queues.resume_kicks()?;
            // Those that wait for more do not wait for the disk: nothing else may tell of them.
            more |= self.queues.available()? > 0;
        }
        Ok(Step {
            interrupt: false,
            config_changed: false,
            activity: if more {
                Activity::Working
            } else {
                self.activity()
            },
        })
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        if let Some(ring) = self.pipeline.events() {
            add(ring, Interest::Readable);
        }
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.limiter.forget();
        if self.queues.stop(index) {
            self.pipeline.forget(index.get());
        }
    }

    fn retire(&mut self) {
        self.pipeline.retire();
        self.cache = None;
    }

    fn settle(&mut self) -> bool {
        self.pipeline.gather_ended();
        self.pipeline.is_settled()
    }

    fn reset(&mut self) {
        self.pipeline.reset();
        if let Some(cache) = &self.cache {
            cache.turn(true);
        }
    }

    fn try_again_at(&self) -> Option<Instant> {
        let waits = [self.pipeline.try_again_at(), self.limiter.next()];
        waits.into_iter().flatten().min()
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

    fn counters(&self) -> RequestCounters {
        let counters = self.pipeline.counters();
        RequestCounters {
            done: counters.requests,
            failed: counters.errors,
        }
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        self.pipeline.counters().list(add);
    }
}
