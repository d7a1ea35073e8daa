//! The way back: what the back-end has used is copied out, and given to the guest.

use super::super::ring::Used;
use super::{Relay, RelayError};
use crate::device::DeviceError;
use crate::engine::{copy, first_fault};
use crate::tuning::MAX_COPIES;
use crate::virtqueue::{QueueIndex, QueueSet};
use std::time::Instant;
use xen_virtio_guest_mapping::GuestAccess;

impl Relay {
    /// Gives the guest what the back-end has used: as much of it as takes not too many copies. True if there was any. The
    /// driver sees it after [`QueueSet::publish`]. With `holds` it may wait for more.
    ///
    /// # Errors
    ///
    /// [`RelayError`].
    pub fn take_out(
        &mut self,
        queues: &mut QueueSet,
        access: &mut dyn GuestAccess,
        holds: bool,
    ) -> Result<bool, RelayError> {
        if self.out_shortage.holds() {
            return Ok(false);
        }
        if self.restore(queues, access)? {
            return Ok(true);
        }
        // What belongs together is gathered at once, and no more until the driver is shown it.
        let gathers = !self.is_lost && (self.used.is_empty() || self.rules.alike);
        let gathered = match gathers {
            true => self.gather(),
            false => Ok(()),
        };
        let expected = self.expected();
        let holds = holds && self.rules.alike;
        if holds
            && !self.is_lost
            && gathered.is_ok()
            && self.holding.holds(self.used.len(), expected)
        {
            return Ok(false);
        }
        let delivered = self.deliver(queues, access);
        gathered?;
        Ok(delivered?)
    }

    /// Whether all that was gathered of a queue has been given to the guest: a packet may be in several buffers, of which a
    /// driver is shown all or none.
    pub fn is_whole(&self, index: QueueIndex) -> bool {
        let inherited = self.inherited.iter();
        let restored = inherited.flat_map(|inherited| &inherited.restored);
        let mut left = self.used.iter().chain(restored);
        left.all(|(queue, _)| *queue != index.get())
    }

    /// Takes what the back-end has used off the shadow rings: also off those behind one that cannot be read.
    pub(super) fn gather(&mut self) -> Result<(), RelayError> {
        let memory = self.region.memory();
        let mut result = Ok(());
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            loop {
                match queue.ring.next_used(&memory) {
                    Ok(None) => break,
                    Ok(Some(Used {
                        head,
                        written,
                        descriptors,
                    })) => {
                        let relaying = queue.requests[usize::from(head)].take();
                        let mut relaying = relaying.expect("the ring knows what the back-end has");
                        relaying.written = written;
                        relaying.descriptors = descriptors;
                        queue.expected -= usize::from(!relaying.plan.receives);
                        self.used.push((index, relaying));
                    }
                    Err(fault) => {
                        let queue = index;
                        result = result.and(Err(RelayError::Backend { queue, fault }));
                        break;
                    }
                }
            }
        }
        result
    }

    fn deliver(
        &mut self,
        queues: &mut QueueSet,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, DeviceError> {
        self.copies.clear();
        let mut ends = Vec::new();
        for (_, relaying) in &self.used {
            if self.copies.len() >= self.most_copies {
                break;
            }
            relaying.plan_out(&mut self.copies);
            ends.push(self.copies.len());
        }
        if ends.is_empty() {
            return Ok(false);
        }
        if let Err(fault) = copy(access, &self.region.memory(), &mut self.copies) {
            self.most_copies = (self.copies.len() / 2).max(1);
            self.out_shortage
                .note("writing the guest's memory", &fault, Instant::now());
            return Ok(false);
        }
        self.out_shortage.end();
        self.most_copies = MAX_COPIES;
        let done: Vec<_> = self.used.drain(..ends.len()).collect();
        let (mut first, mut result) = (0, Ok(()));
        for ((index, relaying), end) in done.into_iter().zip(ends) {
            let fault = first_fault(&self.copies[first..end]);
            first = end;
            let ended = match fault {
                None => self.finish(index, relaying, queues),
                Some(fault) => {
                    self.log("a request's result cannot be written to the guest", &fault);
                    self.fail(index, relaying, queues)
                }
            };
            // Those of other queues are none the worse for one that is broken.
            result = result.and(ended);
        }
        result.map(|()| true)
    }
}
