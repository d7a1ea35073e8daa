//! From the guest's queues to the back-end.

use super::super::pools::Taken;
use super::super::relaying::{Plan, Relaying};
use super::Relay;
use crate::device::{DeviceError, DeviceFailure};
use crate::engine::{copy, first_fault};
use crate::tuning::MAX_COPIES;
use crate::virtqueue::QueueSet;
use smallvec::SmallVec;
use std::ops::Range;
use std::time::Instant;
use xen_virtio_guest_mapping::GuestAccess;

/// A request that is copied in, and its copies.
type Incoming = (usize, Relaying, Range<usize>);

impl Relay {
    /// Takes requests in: as many as there is room for, and as take not too many copies. `kick` is told which queues the
    /// back-end is to look at. True if there were any.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] for what the driver got wrong.
    pub fn take_in(
        &mut self,
        queues: &mut QueueSet,
        access: &mut dyn GuestAccess,
        kick: &mut dyn FnMut(usize),
    ) -> Result<bool, DeviceError> {
        if self.is_lost || self.in_shortage.holds() {
            return Ok(false);
        }
        self.copies.clear();
        let mut incoming = Vec::new();
        let mut worked = false;
        let count = self.queues.len();
        for place in 0..count {
            let index = (self.first + place) % count;
            match self.admit(index, queues, &mut incoming) {
                Ok(admitted) => worked |= admitted,
                Err(error) => {
                    // They have pages.
                    self.put_back(incoming);
                    return Err(error);
                }
            }
        }
        self.first = (self.first + 1) % count;
        if incoming.is_empty() {
            return Ok(worked);
        }
        if let Err(fault) = copy(access, &self.region.memory(), &mut self.copies) {
            self.most_copies = (self.copies.len() / 2).max(1);
            self.in_shortage
                .note("reading the guest's memory", &fault, Instant::now());
            self.put_back(incoming);
            return Ok(worked);
        }
        self.in_shortage.end();
        self.most_copies = MAX_COPIES;
        let mut result = Ok(());
        for (index, mut relaying, copies) in incoming {
            if let Some(fault) = first_fault(&self.copies[copies]) {
                self.log("a request's data cannot be read from the guest", &fault);
                // Those of other queues are none the worse for one that is broken.
                result = result.and(self.fail(index, relaying, queues));
            } else if relaying.request.is_repeated() && self.rules.loss(index).fails(&relaying.plan)
            {
                let loss = self.rules.loss(index);
                loss.answer(&mut relaying, &self.region.memory());
                self.counters.failed += u64::from(loss.is_failure());
                self.used.push((index, relaying));
            } else if let Some(queue) = &mut self.queues[index] {
                let start = relaying.run.start();
                let memory = self.region.memory();
                let head = queue.ring.offer(&relaying.plan.descriptors, start, &memory);
                self.records[index].offer(head, relaying.request.head(), start);
                queue.expected += usize::from(!relaying.plan.receives);
                queue.requests[usize::from(head)] = Some(relaying);
            }
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if let Some(queue) = queue
                && queue.ring.publish(&self.region.memory())
            {
                kick(index);
            }
        }
        result.map(|()| true)
    }

    /// Takes requests of queue `index` that there is room for. True if there were any, or such as are done.
    fn admit(
        &mut self,
        index: usize,
        queues: &mut QueueSet,
        incoming: &mut Vec<Incoming>,
    ) -> Result<bool, DeviceError> {
        let (Some(from), Some(queue)) = (queues.get(index), &mut self.queues[index]) else {
            return Ok(false);
        };
        let (mut worked, mut buffers, mut offered) = (false, 0, 0);
        while buffers < MAX_COPIES && self.copies.len() < self.most_copies {
            let (request, plan) = match queue.waiting.pop_front() {
                Some(waiting) => waiting,
                None => match from.pop()? {
                    Some(request) => {
                        let plan = Plan::of(&request);
                        (request, plan)
                    }
                    None => break,
                },
            };
            buffers += 1 + plan.parts.len();
            if plan.parts.is_empty() {
                self.counters.done += 1;
                from.complete(request.finish(0))?;
                worked = true;
                continue;
            }
            let taken = match queue.ring.room() < offered + plan.descriptors.len() {
                true => Taken::NotNow,
                false => self.pools.take(index, &plan),
            };
            match taken {
                Taken::Pages { run, is_shared } => {
                    offered += plan.descriptors.len();
                    let relaying = Relaying {
                        request,
                        plan,
                        run,
                        is_shared,
                        order: self.offered,
                        written: 0,
                        descriptors: SmallVec::new(),
                    };
                    self.offered += 1;
                    let first = self.copies.len();
                    relaying.plan_in(&mut self.copies);
                    incoming.push((index, relaying, first..self.copies.len()));
                    worked = true;
                }
                Taken::NotNow => {
                    queue.waiting.push_front((request, plan));
                    break;
                }
                Taken::Never { room } => {
                    let pages = plan.pages();
                    return Err(DeviceFailure::Pool { pages, room }.of(index));
                }
            }
        }
        Ok(worked)
    }

    /// The requests wait again, in their order.
    fn put_back(&mut self, incoming: Vec<Incoming>) {
        for (index, relaying, _) in incoming.into_iter().rev() {
            let waiting = self.pools.give_back(index, relaying);
            if let Some(queue) = &mut self.queues[index] {
                queue.waiting.push_front(waiting);
            }
        }
    }

    /// Gives a request back empty, which failed for the guest's fault.
    pub(super) fn fail(
        &mut self,
        index: usize,
        mut relaying: Relaying,
        queues: &mut QueueSet,
    ) -> Result<(), DeviceError> {
        self.counters.failed += 1;
        relaying.written = 0;
        self.finish(index, relaying, queues)
    }
}
