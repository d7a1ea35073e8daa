//! The queues of a device.

use super::journal::QueueJournal;
use super::latency::{Latencies, Timer};
use super::queue::{QueueError, QueueIndex, QueueLayout, Unfinished, VirtQueue};
use super::request::{Completion, Request};
use super::trace::{QueueTrace, RequestDetail, Trace};
use crate::device::{DeviceError, DeviceFailure};
use std::rc::Rc;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

/// What a queue starts with, or goes on from.
pub struct QueueStart {
    pub layout: QueueLayout,
    /// The features that the driver accepted.
    pub features: u64,
    /// What an earlier process has left of it.
    pub journal: QueueJournal,
    /// Where it is said how long its requests take.
    pub latencies: Rc<Latencies>,
    /// Who is told of them.
    pub trace: Rc<Trace>,
}

/// A queue between start and stop.
pub struct ActiveQueue {
    index: QueueIndex,
    queue: VirtQueue,
    features: u64,
    timer: Timer,
    trace: QueueTrace,
    /// Nothing more is taken of it.
    is_closed: bool,
}

/// The queues of a device, of which some are started. What the driver got wrong about one names it.
pub struct QueueSet {
    queues: Vec<Option<ActiveQueue>>,
}

impl QueueSet {
    /// A set of `count` queues, none of them started.
    pub fn new(count: usize) -> Self {
        Self {
            queues: (0..count).map(|_| None).collect(),
        }
    }

    /// Queues, started or not.
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Starts a queue, see [`VirtQueue::map`].
    ///
    /// # Errors
    ///
    /// [`QueueError`] if it is not usable as the driver set it up.
    pub fn start(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        unfinished: Unfinished,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        let QueueStart {
            layout,
            features,
            journal,
            latencies,
            trace,
        } = start;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = VirtQueue::map(layout, event_idx, journal, unfinished, access)?;
        self.queues[index.get()] = Some(ActiveQueue {
            index,
            queue,
            features,
            timer: Timer::new(latencies),
            trace: QueueTrace::new(index, trace),
            is_closed: false,
        });
        Ok(())
    }

    /// Stops a queue: nothing of it is mapped any more. True if it was started.
    pub fn stop(&mut self, index: QueueIndex) -> bool {
        self.queues[index.get()].take().is_some()
    }

    /// Takes nothing more of a queue.
    pub fn close(&mut self, index: QueueIndex) {
        if let Some(queue) = &mut self.queues[index.get()] {
            queue.is_closed = true;
        }
    }

    /// The queue of this number, if it is started.
    pub fn get(&mut self, index: usize) -> Option<&mut ActiveQueue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// The queues that are started.
    pub fn started(&mut self) -> impl Iterator<Item = &mut ActiveQueue> {
        self.queues.iter_mut().flatten()
    }

    /// How many requests wait in the started queues.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if a ring cannot be read.
    pub fn available(&mut self) -> Result<usize, DeviceError> {
        self.started()
            .try_fold(0, |count, queue| Ok(count + queue.available()?))
    }

    /// Shows the driver what was completed. True if it wants an interrupt for that.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if a ring cannot be read or written.
    pub fn publish(&mut self) -> Result<bool, DeviceError> {
        self.publish_whole(|_| true)
    }

    /// As [`QueueSet::publish`], of those queues only for which `is_whole` is true.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn publish_whole(
        &mut self,
        is_whole: impl Fn(QueueIndex) -> bool,
    ) -> Result<bool, DeviceError> {
        let mut whole = self.started().filter(|queue| is_whole(queue.index()));
        whole.try_fold(false, |interrupt, queue| Ok(interrupt | queue.publish()?))
    }

    /// Asks the driver to kick again. True if it made something available meanwhile.
    ///
    /// # Errors
    ///
    /// As [`QueueSet::publish`].
    pub fn resume_kicks(&mut self) -> Result<bool, DeviceError> {
        self.started()
            .try_fold(false, |more, queue| Ok(more | queue.resume_kicks()?))
    }
}

impl ActiveQueue {
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver has accepted the feature of this number.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Whether somebody looks on at its requests.
    pub(crate) fn is_traced(&self) -> bool {
        self.trace.is_on()
    }

    /// See [`VirtQueue::completed`].
    pub fn completed(&self) -> u64 {
        self.queue.completed()
    }

    /// See [`VirtQueue::available`].
    ///
    /// # Errors
    ///
    /// [`DeviceError`], as the others.
    pub fn available(&self) -> Result<usize, DeviceError> {
        if self.is_closed {
            return Ok(0);
        }
        let available = self.queue.available();
        available.map_err(|error| of(self.index, error))
    }

    /// See [`VirtQueue::pop`].
    ///
    /// # Errors
    ///
    /// As [`ActiveQueue::available`].
    pub fn pop(&mut self) -> Result<Option<Request>, DeviceError> {
        if self.is_closed {
            return Ok(None);
        }
        let popped = self.queue.pop();
        let popped = popped.map_err(|error| of(self.index, error))?;
        if let Some(request) = &popped {
            self.timer.begin(request);
            self.trace.begin(request);
        }
        Ok(popped)
    }

    /// See [`VirtQueue::complete`].
    ///
    /// # Errors
    ///
    /// As [`ActiveQueue::available`].
    pub fn complete(&mut self, completion: Completion) -> Result<(), DeviceError> {
        self.complete_with(completion, None)
    }

    /// As [`ActiveQueue::complete`], of a request of which whoever looks on is told `detail`.
    ///
    /// # Errors
    ///
    /// As [`ActiveQueue::available`].
    pub(crate) fn complete_with(
        &mut self,
        completion: Completion,
        detail: Option<RequestDetail>,
    ) -> Result<(), DeviceError> {
        self.timer.end(&completion);
        let traced = self.trace.end(&completion, detail);
        let completed = self.queue.complete(completion);
        completed.map_err(|error| of(self.index, error))?;
        if let Some(traced) = traced {
            self.trace.ended(&traced);
        }
        Ok(())
    }

    /// See [`VirtQueue::publish`].
    ///
    /// # Errors
    ///
    /// As [`ActiveQueue::available`].
    pub fn publish(&mut self) -> Result<bool, DeviceError> {
        let published = self.queue.publish();
        published.map_err(|error| of(self.index, error))
    }

    /// See [`VirtQueue::resume_kicks`].
    ///
    /// # Errors
    ///
    /// As [`ActiveQueue::available`].
    pub fn resume_kicks(&mut self) -> Result<bool, DeviceError> {
        if self.is_closed {
            return Ok(false);
        }
        let resumed = self.queue.resume_kicks();
        resumed.map_err(|error| of(self.index, error))
    }
}

fn of(index: QueueIndex, error: QueueError) -> DeviceError {
    DeviceFailure::from(error).of(index.get())
}
