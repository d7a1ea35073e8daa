//! Devices whose requests are carried out one after the other, each at once: what is left to say of such a device is what
//! it makes of a request.

use crate::device::{Activity, Device, DeviceError, Identity, RequestCounters, Step};
use crate::shortage::Shortage;
use crate::tuning::SIMPLE_BATCH;
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use std::error::Error;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// What carries out a device's requests.
pub trait Serve {
    fn identity(&self) -> &Identity;

    /// What becomes of requests that were taken from `queue` when a process died.
    fn unfinished(&self, queue: QueueIndex) -> Unfinished;

    /// When the next request may be carried out, if that is later than `now`.
    fn not_before(&mut self, _now: Instant) -> Option<Instant> {
        None
    }

    /// Carries out a request of `queue`. How many bytes of its writable buffers were filled, from their beginning on: no
    /// more than they have room for.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn serve(
        &mut self,
        queue: usize,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, Failure>;

    /// See [`Device::metrics`].
    fn metrics(&self, _add: &mut dyn FnMut(&'static str, u64)) {}
}

/// Why a request was not carried out.
#[derive(Debug)]
pub enum Failure {
    /// The guest asked for what cannot be: it has the request back, with nothing written.
    Guest,
    /// dom0 lacks something: the request waits, and is carried out once more.
    Dom0(Box<dyn Error>),
}

impl From<CopyFault> for Failure {
    fn from(fault: CopyFault) -> Self {
        if fault.is_dom0s() {
            Self::Dom0(Box::new(fault))
        } else {
            Self::Guest
        }
    }
}

/// The device that has its requests carried out by `S`.
pub struct OneByOne<S> {
    server: S,
    queues: QueueSet,
    /// A request that was taken, with its queue, and waits for dom0.
    held: Option<(usize, Request)>,
    /// Requests wait until then.
    not_before: Option<Instant>,
    shortage: Shortage,
    counters: RequestCounters,
}

impl<S: Serve> OneByOne<S> {
    pub fn new(server: S) -> Self {
        Self {
            queues: QueueSet::new(server.identity().queue_sizes.len()),
            server,
            held: None,
            not_before: None,
            shortage: Shortage::default(),
            counters: RequestCounters::default(),
        }
    }

    /// The next request, with its queue, if one may be carried out now.
    fn next(&mut self) -> Result<Option<(usize, Request)>, DeviceError> {
        if self.shortage.holds() {
            return Ok(None);
        }
        if let Some(held) = self.held.take() {
            return Ok(Some(held));
        }
        // Whoever has taken back what waited waits for nothing.
        self.not_before = None;
        if self.queues.available()? == 0 {
            return Ok(None);
        }
        self.not_before = self.server.not_before(Instant::now());
        if self.not_before.is_some() {
            return Ok(None);
        }
        for queue in self.queues.started() {
            if let Some(request) = queue.pop()? {
                return Ok(Some((queue.index().get(), request)));
            }
        }
        Ok(None)
    }

    /// Carries out a request. False if dom0 lacked something.
    fn carry_out(
        &mut self,
        queue: usize,
        request: Request,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, DeviceError> {
        let written = match self.server.serve(queue, &request, access) {
            Ok(written) => written,
            Err(Failure::Guest) => {
                self.counters.failed += 1;
                0
            }
            Err(Failure::Dom0(error)) => {
                self.shortage
                    .note("carrying out a request", &*error, Instant::now());
                self.held = Some((queue, request));
                return Ok(false);
            }
        };
        self.shortage.end();
        self.counters.done += 1;
        if let Some(queue) = self.queues.get(queue) {
            let written = written.min(request.writable.len());
            queue.complete(request.finish(written))?;
        }
        Ok(true)
    }
}

impl<S: Serve> Device for OneByOne<S> {
    fn identity(&self) -> &Identity {
        self.server.identity()
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        let unfinished = self.server.unfinished(index);
        self.queues.start(index, start, unfinished, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        for _ in 0..SIMPLE_BATCH {
            let Some((queue, request)) = self.next()? else {
                break;
            };
            if !self.carry_out(queue, request, access)? {
                break;
            }
            step.activity = Activity::Working;
        }
        step.interrupt = self.queues.publish()?;
        Ok(step)
    }

    fn prepare_sleep(&mut self, _access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        // While requests wait, a kick would tell of more that wait.
        let waits = self.try_again_at().is_some();
        if !waits && (self.queues.resume_kicks()? || self.queues.available()? > 0) {
            step.activity = Activity::Working;
        }
        Ok(step)
    }

    fn try_again_at(&self) -> Option<Instant> {
        let waits = [self.not_before, self.shortage.try_at()];
        waits.into_iter().flatten().min()
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        if self
            .held
            .take_if(|(queue, _)| *queue == index.get())
            .is_some()
        {
            self.shortage.forget();
        }
        self.not_before = None;
    }

    fn reset(&mut self) {}

    fn warning(&self) -> Option<String> {
        self.shortage.warning()
    }

    fn counters(&self) -> RequestCounters {
        self.counters
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        self.server.metrics(add);
    }
}
