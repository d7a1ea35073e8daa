//! The last stage: what has ended is copied to the guest, and given back.

use super::Pipeline;
use crate::blk::blk_request::BlkRequest;
use crate::blk::header::Status;
use crate::device::{DeviceError, DeviceFailure};
use crate::engine::{Stopwatch, copy, first_fault};
use crate::tuning::MAX_COPIES;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

impl Pipeline {
    /// Copies out what has ended, or as much of it as takes not too many copies, and hands each finished
    /// request to `complete`, with the number of its queue.
    ///
    /// # Errors
    ///
    /// [`DeviceFailure::Status`] if a request cannot be told how it ended, and those of `complete`.
    pub(in crate::blk) fn deliver(
        &mut self,
        access: &mut dyn GuestAccess,
        mut complete: impl FnMut(usize, BlkRequest) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut stopwatch = Stopwatch::start(&mut self.counters.time.deliveries);
        let count = self.copy_out(access)?;
        stopwatch.stop(&mut self.counters.time.copy_out);
        let mut result = Ok(());
        for id in self.ended.drain(..count) {
            let request = &mut self.requests[usize::from(id)];
            request.advance(&mut self.counters);
            if let Some(run) = request.chunk.run.take() {
                self.pool.give_back(run);
            }
            if request.is_finished() {
                let request = self.requests.remove(id.into());
                let queue = request
                    .queue
                    .expect("what has ended of no queue is removed");
                // Those of other queues are none the worse for one that is broken.
                let completed = complete(queue, request);
                result = result.and(completed);
            } else {
                self.waiting.push_back(id);
            }
        }
        result
    }

    /// How many of those that have ended were copied out.
    fn copy_out(&mut self, access: &mut dyn GuestAccess) -> Result<usize, DeviceError> {
        self.copies_out.clear();
        let mut count = 0;
        for &id in &self.ended {
            if self.copies_out.len() >= self.most_copies {
                break;
            }
            let request = &mut self.requests[usize::from(id)];
            request.plan_copies_out(&self.io.memory(), &mut self.copies_out);
            count += 1;
        }
        if let Err(fault) = copy(access, &self.io.memory(), &mut self.copies_out) {
            return Ok(self.postpone(fault));
        }
        // A request whose data could not be delivered failed, and is told so in a copy of its own.
        for index in 0..count {
            let request = &mut self.requests[usize::from(self.ended[index])];
            let Some(fault) = first_fault(&self.copies_out[request.chunk.copies.clone()]) else {
                continue;
            };
            request.fail(Status::IoError);
            let queue = request
                .queue
                .expect("what has ended of no queue is removed");
            let mut again = Vec::new();
            request.plan_status(&self.io.memory(), &mut again);
            if let Err(fault) = copy(access, &self.io.memory(), &mut again) {
                return Ok(self.postpone(fault));
            }
            self.log("a request's result cannot be written to the guest", &fault);
            if let Some(fault) = first_fault(&again) {
                return Err(DeviceFailure::Status(fault).of(queue));
            }
        }
        if count > 0 {
            self.copy_shortage.end();
            self.most_copies = MAX_COPIES;
        }
        Ok(count)
    }

    /// Nothing is delivered now: what was copied is copied again.
    fn postpone(&mut self, fault: CopyFault) -> usize {
        self.most_copies = (self.copies_out.len() / 2).max(1);
        self.copy_shortage
            .note("writing the guest's memory", &fault, Instant::now());
        0
    }
}
