//! Requests on their way from a guest's queues to a back-end's, and back.

use super::region::Region;
use super::relaying::{Plan, Relaying};
use super::ring::{BackendFault, ShadowRing, Used};
use crate::device::{DeviceError, RequestCounters};
use crate::engine::{Pool, copy, first_fault};
use crate::log_limit::LogLimit;
use crate::shortage::Shortage;
use crate::tuning::MAX_COPIES;
use crate::virtqueue::{QueueIndex, QueueSet, Request};
use std::collections::VecDeque;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, CopyOp, GuestAccess, PAGE_SIZE};

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The guest's driver is to be told.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The back-end is to be given up.
    #[error("queue {queue}")]
    Backend {
        queue: usize,
        #[source]
        fault: BackendFault,
    },
}

/// The queues of a device, each with its shadow.
pub struct Relay {
    region: Region,
    base: u64,
    pools: Pools,
    queues: Vec<Option<Relayed>>,
    /// Requests that are copied in, and not offered yet.
    incoming: Vec<(usize, Relaying)>,
    /// Requests that the back-end has used, and that are copied out.
    outgoing: Vec<(usize, Relaying)>,
    copies_in: Vec<CopyOp>,
    copies_out: Vec<CopyOp>,
    /// Pages that a back-end may write to still, of queues that were stopped.
    left_behind: Vec<(usize, Relaying)>,
    offered: u64,
    shortage: Shortage,
    counters: RequestCounters,
    log_limit: LogLimit,
}

/// A queue between start and stop.
struct Relayed {
    ring: ShadowRing,
    /// What the back-end has, by head.
    requests: Vec<Option<Relaying>>,
    /// Requests that wait for room in the pool or in the ring.
    waiting: VecDeque<Request>,
    /// Pages of requests in which there is nothing to read.
    receiving: usize,
}

/// The region's memory for data: one half for requests that may stay with the back-end for ever, so that these cannot
/// keep the others from passing.
struct Pools {
    receiving: Pool,
    passing: Pool,
    pages: usize,
}

impl Pools {
    fn new(region: &Region) -> Self {
        let all = region.pool();
        let pages = all.len() / PAGE_SIZE / 2;
        let middle = all.start + pages * PAGE_SIZE;
        Self {
            receiving: Pool::new(all.start..middle),
            passing: Pool::new(middle..all.end),
            pages,
        }
    }

    /// Pages that one request may have.
    fn pages(&self) -> usize {
        self.pages
    }

    fn of(&mut self, receives: bool) -> &mut Pool {
        match receives {
            true => &mut self.receiving,
            false => &mut self.passing,
        }
    }

    /// The request without its pages, which are free again.
    fn give_back(&mut self, relaying: Relaying) -> Request {
        self.of(relaying.receives).give_back(relaying.run);
        relaying.request
    }
}

impl Relay {
    /// The queues of `region`, whose first byte the back-end knows as `base`.
    pub fn new(region: Region, base: u64) -> Self {
        Self {
            pools: Pools::new(&region),
            queues: region.rings().iter().map(|_| None).collect(),
            region,
            base,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            copies_in: Vec::new(),
            copies_out: Vec::new(),
            left_behind: Vec::new(),
            offered: 0,
            shortage: Shortage::default(),
            counters: RequestCounters::default(),
            log_limit: LogLimit::default(),
        }
    }

    pub fn region(&self) -> &Region {
        &self.region
    }

    pub fn counters(&self) -> RequestCounters {
        self.counters
    }

    /// What dom0 lacks for it to go on.
    pub fn warning(&self) -> Option<String> {
        self.shortage.warning()
    }

    /// When to go on with what dom0 lacked something for.
    pub fn try_again_at(&self) -> Option<Instant> {
        self.shortage.try_at()
    }

    /// Begins to relay a queue that a back-end does not serve yet. `event_idx` is what the back-end has accepted.
    pub fn start(&mut self, index: QueueIndex, event_idx: bool) {
        let places = &self.region.rings()[index.get()];
        let entries = usize::from(places.size);
        let ring = ShadowRing::new(places, self.base, event_idx, &self.region.memory());
        self.queues[index.get()] = Some(Relayed {
            ring,
            requests: (0..entries).map(|_| None).collect(),
            waiting: VecDeque::new(),
            receiving: 0,
        });
    }

    /// Forgets a queue. What the back-end has of it keeps its memory until [`Relay::settle`].
    pub fn stop(&mut self, index: QueueIndex) {
        let index = index.get();
        if let Some(queue) = self.queues[index].take() {
            let requests = queue.requests.into_iter().flatten();
            self.left_behind
                .extend(requests.map(|relaying| (index, relaying)));
        }
        for way in [&mut self.incoming, &mut self.outgoing] {
            for (_, relaying) in way.extract_if(.., |(queue, _)| *queue == index) {
                drop(self.pools.give_back(relaying));
            }
        }
        // Nothing is copied any more of what was forgotten.
        self.copies_in.clear();
        for (_, relaying) in &mut self.incoming {
            relaying.plan_in(&mut self.copies_in);
        }
        self.copies_out.clear();
        for (_, relaying) in &mut self.outgoing {
            relaying.plan_out(relaying.written, &mut self.copies_out);
        }
        if self.incoming.is_empty() && self.outgoing.is_empty() {
            self.shortage.forget();
        }
    }

    /// The back-end has let go of a queue that was stopped.
    pub fn settle(&mut self, index: QueueIndex) {
        let of_it = |(queue, _): &mut (usize, Relaying)| *queue == index.get();
        for (_, relaying) in self.left_behind.extract_if(.., of_it) {
            drop(self.pools.give_back(relaying));
        }
    }

    /// Whether a back-end has nothing of queues that were stopped.
    pub fn is_settled(&self) -> bool {
        self.left_behind.is_empty()
    }

    /// Has the next back-end, with a `region` of its own, do what the last one has not used: in the order in which it was
    /// offered. Queues that were started are so still.
    pub fn repeat(&mut self, region: Region, event_idx: bool) {
        let mut unfinished = std::mem::take(&mut self.incoming);
        unfinished.append(&mut self.outgoing);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let requests = queue.iter_mut().flat_map(|queue| &mut queue.requests);
            let requests = requests.filter_map(Option::take);
            unfinished.extend(requests.map(|relaying| (index, relaying)));
        }
        unfinished.sort_unstable_by_key(|(_, relaying)| relaying.order);
        self.region = region;
        self.pools = Pools::new(&self.region);
        self.left_behind.clear();
        let memory = self.region.memory();
        for (queue, places) in self.queues.iter_mut().zip(self.region.rings()) {
            if let Some(queue) = queue {
                queue.ring = ShadowRing::new(places, self.base, event_idx, &memory);
                queue.receiving = 0;
            }
        }
        for (index, relaying) in unfinished.into_iter().rev() {
            if let Some(queue) = &mut self.queues[index] {
                queue.waiting.push_front(relaying.request);
            }
        }
        self.shortage.forget();
    }

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
        if self.shortage.holds() {
            return Ok(false);
        }
        if self.incoming.is_empty() {
            self.copies_in.clear();
            for index in 0..self.queues.len() {
                self.admit(index, queues)?;
            }
        }
        if self.incoming.is_empty() {
            return Ok(false);
        }
        if let Err(fault) = copy(access, &self.region.memory(), &mut self.copies_in) {
            self.postpone("reading the guest's memory", &fault);
            return Ok(false);
        }
        self.shortage.end();
        for (index, mut relaying) in std::mem::take(&mut self.incoming) {
            let Some(queue) = &mut self.queues[index] else {
                continue;
            };
            if let Some(fault) = first_fault(&self.copies_in[relaying.copies.clone()]) {
                self.log("a request's data cannot be read from the guest", &fault);
                self.give_back(index, relaying, queues)?;
                continue;
            }
            relaying.order = self.offered;
            self.offered += 1;
            let head = queue.ring.offer(&relaying.parts, &self.region.memory());
            queue.requests[usize::from(head)] = Some(relaying);
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if let Some(queue) = queue
                && queue.ring.publish(&self.region.memory())
            {
                kick(index);
            }
        }
        Ok(true)
    }

    /// Takes requests of queue `index` that there is room for.
    fn admit(&mut self, index: usize, queues: &mut QueueSet) -> Result<(), DeviceError> {
        let Some(from) = queues.get(index) else {
            return Ok(());
        };
        let mut offered = 0;
        while self.copies_in.len() < MAX_COPIES
            && let Some(queue) = &mut self.queues[index]
        {
            let request = match queue.waiting.pop_front() {
                Some(request) => request,
                None => match from.pop()? {
                    Some(request) => request,
                    None => break,
                },
            };
            let plan = Plan::of(&request);
            if plan.parts.is_empty() || plan.pages() > self.pools.pages() {
                self.counters.failed += u64::from(!plan.parts.is_empty());
                self.counters.done += 1;
                if !plan.parts.is_empty() && self.log_limit.allow() {
                    tracing::warn!(
                        "a request of {} bytes is given back empty: the device's pool has room for one of {} (pool-kib)",
                        request.readable.len() + request.writable.len(),
                        self.pools.pages() * PAGE_SIZE
                    );
                }
                from.complete(request.finish(0))?;
                continue;
            }
            let receives = request.readable.is_empty();
            let quota = self.pools.pages() / self.region.rings().len();
            let has_quota = queue.receiving == 0 || queue.receiving + plan.pages() <= quota;
            let has_room = queue.ring.room() >= offered + plan.parts.len();
            let run = (has_room && (!receives || has_quota))
                .then(|| self.pools.of(receives).take(plan.bytes))
                .flatten();
            let Some(run) = run else {
                queue.waiting.push_front(request);
                break;
            };
            offered += plan.parts.len();
            queue.receiving += if receives { plan.pages() } else { 0 };
            let pages = plan.pages();
            let relaying = plan.relay(request, run, pages, receives, &mut self.copies_in);
            self.incoming.push((index, relaying));
        }
        Ok(())
    }

    /// Gives the guest what the back-end has used: as much of it as takes not too many copies. True if there was any. The
    /// driver sees it after [`QueueSet::publish`].
    ///
    /// # Errors
    ///
    /// [`RelayError`].
    pub fn take_out(
        &mut self,
        queues: &mut QueueSet,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, RelayError> {
        if self.shortage.holds() {
            return Ok(false);
        }
        if self.outgoing.is_empty() {
            self.copies_out.clear();
            self.gather()?;
        }
        if self.outgoing.is_empty() {
            return Ok(false);
        }
        if let Err(fault) = copy(access, &self.region.memory(), &mut self.copies_out) {
            self.postpone("writing the guest's memory", &fault);
            return Ok(false);
        }
        self.shortage.end();
        for (index, mut relaying) in std::mem::take(&mut self.outgoing) {
            if let Some(fault) = first_fault(&self.copies_out[relaying.copies.clone()]) {
                self.log("a request's result cannot be written to the guest", &fault);
                relaying.written = 0;
                self.give_back(index, relaying, queues)?;
                continue;
            }
            self.finish(index, relaying, queues)?;
        }
        Ok(true)
    }

    /// Takes what the back-end has used off the shadow rings.
    fn gather(&mut self) -> Result<(), RelayError> {
        let memory = self.region.memory();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            while self.copies_out.len() < MAX_COPIES {
                let used = queue.ring.next_used(&memory);
                let used = used.map_err(|fault| RelayError::Backend {
                    queue: index,
                    fault,
                })?;
                let Some(Used { head, written }) = used else {
                    break;
                };
                let relaying = queue.requests[usize::from(head)].take();
                let mut relaying = relaying.expect("the ring knows what the back-end has");
                relaying.plan_out(written, &mut self.copies_out);
                self.outgoing.push((index, relaying));
            }
        }
        Ok(())
    }

    /// Gives a request back that failed for the guest's fault.
    fn give_back(
        &mut self,
        index: usize,
        relaying: Relaying,
        queues: &mut QueueSet,
    ) -> Result<(), DeviceError> {
        self.counters.failed += 1;
        self.finish(index, relaying, queues)
    }

    fn finish(
        &mut self,
        index: usize,
        relaying: Relaying,
        queues: &mut QueueSet,
    ) -> Result<(), DeviceError> {
        self.counters.done += 1;
        if let Some(queue) = &mut self.queues[index]
            && relaying.receives
        {
            queue.receiving -= relaying.pages;
        }
        let written = relaying.written as usize;
        let request = self.pools.give_back(relaying);
        match queues.get(index) {
            Some(queue) => queue.complete(request.finish(written)),
            None => Ok(()),
        }
    }

    /// Asks back-end and driver to tell of the next thing that they do. True if one of them has done something meanwhile.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the driver's rings cannot be read.
    pub fn prepare_sleep(&mut self, queues: &mut QueueSet) -> Result<bool, DeviceError> {
        let memory = self.region.memory();
        let mut more = false;
        let mut waits = false;
        for queue in self.queues.iter_mut().flatten() {
            more |= queue.ring.want_calls(&memory);
            waits |= !queue.waiting.is_empty();
        }
        // While requests wait for room, a kick would tell of more that wait.
        if !waits {
            more |= queues.resume_kicks()?;
        }
        Ok(more)
    }

    fn postpone(&mut self, doing: &str, fault: &CopyFault) {
        self.shortage.note(doing, fault, Instant::now());
    }

    fn log(&mut self, what: &str, fault: &CopyFault) {
        if self.log_limit.allow() {
            tracing::warn!("{what}: {fault}; it comes back empty");
        }
    }
}
