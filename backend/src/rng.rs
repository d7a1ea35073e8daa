//! The entropy device (virtio 1.3, 5.4): bytes of dom0's kernel.

use crate::device::{DeviceType, Identity};
use crate::engine::{Allowance, Failure, Scratch, Serve};
use crate::virtqueue::{QueueIndex, Request, Unfinished};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

/// A request counts at least as so many bytes: what a small one costs.
const LEAST: u64 = 64;

/// What was not asked for in one is not kept for the next. Long enough that whoever waits for the next one sleeps most of the
/// time.
const PERIOD: Duration = Duration::from_millis(100);

/// Fills buffers with random bytes.
pub struct Rng {
    identity: Identity,
    scratch: Scratch,
    allowance: Allowance,
    bytes: u64,
}

impl Rng {
    pub const DEVICE_TYPE: DeviceType = DeviceType(VIRTIO_ID_RNG);

    /// The largest size of its queue.
    pub const QUEUE_SIZE: u16 = 64;

    /// One that gives `rate` bytes a second at most.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(rate: u64) -> io::Result<Self> {
        Ok(Self {
            identity: Identity {
                device_type: Self::DEVICE_TYPE,
                features: 1 << VIRTIO_RING_F_EVENT_IDX,
                queue_sizes: vec![Self::QUEUE_SIZE],
            },
            scratch: Scratch::new()?,
            allowance: Allowance::new(rate, PERIOD, Instant::now()),
            bytes: 0,
        })
    }
}

impl Serve for Rng {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn unfinished(&self, _queue: QueueIndex) -> Unfinished {
        Unfinished::Repeat
    }

    fn not_before(&mut self, now: Instant) -> Option<Instant> {
        (!self.allowance.admits(now)).then(|| self.allowance.next())
    }

    fn serve(
        &mut self,
        _queue: usize,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, Failure> {
        let mut random = [0; Scratch::BYTES];
        let bytes = &mut random[..request.writable.len().min(Scratch::BYTES)];
        let count = getrandom(&mut *bytes, GetRandomFlags::NONBLOCK)
            .map_err(|error| Failure::Dom0(Box::new(error)))?;
        self.allowance.spend(LEAST.max(count as u64));
        let written = self
            .scratch
            .write(&bytes[..count], &request.writable, access)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("entropy_bytes", self.bytes);
    }
}
