//! A back-end that an earlier process has had: it lets go of its queues, the guest is given what it had done, and what it has
//! not seen is offered to it anew.

use super::super::record::{Done, Finished, Left};
use super::super::region::Region;
use super::super::relaying::{Plan, Relaying};
use super::Relay;
use crate::device::DeviceError;
use crate::engine::{PageRun, copy, first_fault};
use crate::tuning::MAX_COPIES;
use crate::virtqueue::{QueueIndex, QueueSet, Request};
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::ops::Range;
use std::time::Instant;
use xen_virtio_guest_mapping::{GuestAccess, PAGE_SIZE};

/// What an earlier process's back-end has, or had.
pub(super) struct Inherited {
    pub(super) region: Region,
    /// By queue, until it is known what the back-end has used; then that.
    left: Vec<Left>,
    pub(super) finished: Option<Vec<Finished>>,
    /// By queue: what the last process had taken of it is to be popped.
    is_awaited: Vec<bool>,
    /// What the back-end has used, and the guest does not have yet; once it is sorted, what is the guest's first is last.
    pub(super) restored: Vec<(usize, Relaying)>,
    is_sorted: bool,
}

impl Inherited {
    /// The driver has stopped queue `index`.
    pub(super) fn stop(&mut self, index: QueueIndex) {
        let index = index.get();
        self.restored.retain(|(queue, _)| *queue != index);
        self.is_awaited[index] = false;
    }
}

impl Relay {
    /// The back-end of an earlier process is there still, with what it has had in `region`: what becomes of that is known when it
    /// has let go of all queues, [`Relay::take_over`]. False if that region is not the one that the records are of.
    pub fn inherit(&mut self, region: Region) -> bool {
        let rings = region.rings().iter().zip(&self.records);
        let left = rings.map(|(places, record)| Left::of(record, places.size, region.name()));
        let left: Vec<_> = left.collect();
        if left.iter().all(Option::is_none) {
            return false;
        }
        // A queue that the driver does not use is of no region.
        let left = left
            .into_iter()
            .map(|left| left.unwrap_or_else(Left::nothing));
        let left: Vec<_> = left.collect();
        self.inherited = Some(Inherited {
            region,
            is_awaited: left.iter().map(|left| !left.is_nothing()).collect(),
            left,
            finished: None,
            restored: Vec::new(),
            is_sorted: false,
        });
        self.is_lost = true;
        true
    }

    /// The back-end of an earlier process has let go of all queues: what it has used is the guest's, and the rest it has not seen.
    pub fn take_over(&mut self) {
        if let Some(inherited) = &mut self.inherited {
            self.is_taken_over = true;
            let left = std::mem::take(&mut inherited.left).into_iter();
            let finished = left.zip(inherited.region.rings());
            let finished = finished.map(|(left, places)| left.finished(&inherited.region, places));
            inherited.finished = Some(finished.collect());
        }
    }

    /// Gives the guest what the back-end of an earlier process has used, and has what that process had taken besides wait for the
    /// next one. True if there was anything.
    pub(super) fn restore(
        &mut self,
        queues: &mut QueueSet,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, DeviceError> {
        let is_known = |inherited: &Inherited| inherited.finished.is_some();
        if !self.inherited.as_ref().is_some_and(is_known) {
            return Ok(false);
        }
        for index in 0..self.queues.len() {
            if self.queues[index].is_none() && queues.get(index).is_some() {
                self.queues[index] = Some(self.relayed(index));
            }
        }
        let Some(inherited) = &mut self.inherited else {
            return Ok(false);
        };
        let mut buffers = 0;
        let finished = inherited.finished.iter_mut().flatten();
        for (index, finished) in finished.enumerate() {
            if !inherited.is_awaited[index] {
                continue;
            }
            let (Some(from), Some(queue)) = (queues.get(index), &mut self.queues[index]) else {
                // dom0 could not map it yet.
                return Ok(false);
            };
            // What was taken comes first.
            loop {
                if buffers >= MAX_COPIES {
                    return Ok(true);
                }
                let Some(request) = from.pop()? else { break };
                let plan = Plan::of(&request);
                buffers += 1 + plan.parts.len();
                if !request.is_repeated() {
                    queue.waiting.push_back((request, plan));
                    break;
                }
                match finished.remove(&request.head()) {
                    Some(done) => {
                        let pool = inherited.region.pool();
                        let relaying = restored(request, plan, done, &pool);
                        inherited.restored.push((index, relaying));
                    }
                    None => queue.waiting.push_back((request.untouched(), plan)),
                }
            }
            inherited.is_awaited[index] = false;
        }
        if !std::mem::replace(&mut inherited.is_sorted, true) {
            let order = |(index, relaying): &(usize, Relaying)| Reverse((*index, relaying.order));
            inherited.restored.sort_unstable_by_key(order);
        }
        self.copies.clear();
        let mut ends = Vec::new();
        for (_, relaying) in inherited.restored.iter().rev() {
            if self.copies.len() >= self.most_copies {
                break;
            }
            relaying.plan_out(&mut self.copies);
            ends.push(self.copies.len());
        }
        if let Err(fault) = copy(access, &inherited.region.memory(), &mut self.copies) {
            self.most_copies = (self.copies.len() / 2).max(1);
            let doing = "writing the guest's memory";
            self.out_shortage.note(doing, &fault, Instant::now());
            return Ok(true);
        }
        self.out_shortage.end();
        self.most_copies = MAX_COPIES;
        let left = inherited.restored.len() - ends.len();
        let mut first = 0;
        for ((index, relaying), end) in inherited.restored.drain(left..).rev().zip(ends) {
            let failed = first_fault(&self.copies[first..end]).is_some();
            first = end;
            let written = if failed { 0 } else { relaying.written as usize };
            self.counters.done += 1;
            self.counters.failed += u64::from(failed);
            if let Some(queue) = queues.get(index) {
                queue.complete(relaying.request.finish(written))?;
            }
        }
        if inherited.restored.is_empty() {
            self.inherited = None;
        }
        Ok(true)
    }
}

/// A request that was used, in a region with this pool. One that the guest has changed since has
/// what there is room for now, or nothing.
fn restored(request: Request, plan: Plan, done: Done, pool: &Range<usize>) -> Relaying {
    let Done {
        order,
        page,
        written,
    } = done;
    let start = page.saturating_mul(PAGE_SIZE);
    let is_there = pool.start <= start && start + plan.bytes <= pool.end;
    let room = u32::try_from(request.writable.len()).expect("what a request has room for");
    let (page, pages, written) = match is_there {
        true => (page, plan.pages(), written.min(room)),
        false => (pool.start / PAGE_SIZE, 0, 0),
    };
    Relaying {
        request,
        // Without buffers there is nothing to copy.
        plan: if is_there {
            plan
        } else {
            Plan::of(&Request::new(0))
        },
        run: PageRun::left(page, pages),
        is_shared: false,
        order: order.into(),
        written,
        descriptors: SmallVec::new(),
    }
}
