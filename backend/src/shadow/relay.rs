//! Requests on their way from a guest's queues to a back-end's, and back.

mod holding;
mod inherited;
mod outgoing;

use super::loss::Rules;
use super::pools::{Pools, Taken};
use super::record::ShadowRecord;
use super::region::Region;
use super::relaying::{Plan, Relaying};
use super::ring::{BackendFault, ShadowRing};
use crate::device::{DeviceError, DeviceFailure, RequestCounters};
use crate::engine::{copy, first_fault};
use crate::log_limit::LogLimit;
use crate::shortage::Shortage;
use crate::tuning::{MAX_COPIES, SHORTEST_SLEEP};
use crate::virtqueue::{QueueIndex, QueueSet, Request};
use holding::{FEW, Holding};
use inherited::Inherited;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, CopyOp, GuestAccess};

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
    /// What the back-end knows the region's first byte by.
    base: u64,
    event_idx: bool,
    rules: Rules,
    pools: Pools,
    queues: Vec<Option<Relayed>>,
    /// The queue that is looked at first.
    first: usize,
    /// Requests that the back-end has used, and the guest does not have yet.
    used: Vec<(usize, Relaying)>,
    /// Requests of queues that were stopped, whose pages the back-end may write to still.
    left_behind: Vec<(usize, Relaying)>,
    /// The back-end is gone, and no other one is there yet.
    is_lost: bool,
    records: Vec<ShadowRecord>,
    inherited: Option<Inherited>,
    offered: u64,
    /// As [`MAX_COPIES`], or fewer, if dom0 had not enough for so many at once.
    most_copies: usize,
    copies: Vec<CopyOp>,
    holding: Holding,
    /// When to look what the back-end has used, which does not tell of each.
    look_at: Option<Instant>,
    in_shortage: Shortage,
    out_shortage: Shortage,
    counters: RequestCounters,
    log_limit: LogLimit,
}

/// A queue between start and stop.
struct Relayed {
    ring: ShadowRing,
    /// What the back-end has, by head.
    requests: Vec<Option<Relaying>>,
    /// As many of them are to be answered soon: the others wait for something to be written to them.
    expected: usize,
    /// Requests that wait for room in the pool or in the ring.
    waiting: VecDeque<(Request, Plan)>,
}

/// A request that is copied in, and its copies.
type Incoming = (usize, Relaying, Range<usize>);

impl Relay {
    /// Queues of at most `sizes` entries, with `pool` bytes for data, whose region a back-end knows by the address `base`, and of
    /// which `records` are kept.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(
        sizes: &[u16],
        pool: usize,
        base: u64,
        rules: Rules,
        records: Vec<ShadowRecord>,
    ) -> io::Result<Self> {
        let region = Region::new(sizes, pool)?;
        Ok(Self {
            records,
            inherited: None,
            pools: Pools::new(&region),
            queues: sizes.iter().map(|_| None).collect(),
            region,
            base,
            event_idx: false,
            rules,
            first: 0,
            used: Vec::new(),
            left_behind: Vec::new(),
            is_lost: false,
            offered: 0,
            most_copies: MAX_COPIES,
            copies: Vec::new(),
            holding: Holding::default(),
            look_at: None,
            in_shortage: Shortage::default(),
            out_shortage: Shortage::default(),
            counters: RequestCounters::default(),
            log_limit: LogLimit::default(),
        })
    }

    /// What the back-end is to map.
    pub fn region(&self) -> &Region {
        &self.region
    }

    pub fn counters(&self) -> RequestCounters {
        self.counters
    }

    /// What dom0 lacks for it to go on.
    pub fn warning(&self) -> Option<String> {
        let warning = self.in_shortage.warning();
        warning.or_else(|| self.out_shortage.warning())
    }

    /// When to go on with what dom0 lacked something for, or to look for what the back-end does not tell of.
    pub fn try_again_at(&self) -> Option<Instant> {
        let times = [
            self.in_shortage.try_at(),
            self.out_shortage.try_at(),
            self.look_at,
        ];
        times.into_iter().flatten().min()
    }

    /// Begins to relay a queue, which the back-end does not serve yet. It has accepted `VIRTIO_RING_F_EVENT_IDX`, if
    /// `event_idx`.
    ///
    /// # Panics
    ///
    /// If the back-end has something of it still: [`Relay::is_settled`].
    pub fn start(&mut self, index: QueueIndex, event_idx: bool) {
        assert!(self.is_settled(index), "the back-end has let go of it");
        let index = index.get();
        self.event_idx = event_idx;
        self.records[index].begin(self.region.name());
        self.queues[index] = Some(self.relayed(index));
    }

    fn relayed(&self, index: usize) -> Relayed {
        Relayed {
            ring: self.ring(index),
            requests: (0..self.region.rings()[index].size).map(|_| None).collect(),
            expected: 0,
            waiting: VecDeque::new(),
        }
    }

    fn ring(&self, index: usize) -> ShadowRing {
        let places = &self.region.rings()[index];
        let mut ring = ShadowRing::new(places, self.base, self.event_idx, &self.region.memory());
        ring.overstate = self.rules.overstate;
        ring
    }

    /// Forgets a queue. What the back-end has of it keeps its memory until [`Relay::settle`].
    pub fn stop(&mut self, index: QueueIndex) {
        if let Some(inherited) = &mut self.inherited {
            inherited.stop(index);
        }
        let index = index.get();
        if let Some(queue) = self.queues[index].take() {
            let requests = queue.requests.into_iter().flatten();
            self.left_behind
                .extend(requests.map(|relaying| (index, relaying)));
        }
        for (_, relaying) in self.used.extract_if(.., |(queue, _)| *queue == index) {
            drop(self.pools.give_back(index, relaying));
        }
        self.pools.forget(index);
        // Who has asked for that sleeps no more, or asks again.
        self.look_at = None;
        if self.used.is_empty() {
            self.out_shortage.forget();
        }
        if self.queues.iter().all(Option::is_none) {
            self.in_shortage.forget();
        }
    }

    /// The back-end has let go of a queue that was stopped.
    pub fn settle(&mut self, index: QueueIndex) {
        let index = index.get();
        for (_, relaying) in self
            .left_behind
            .extract_if(.., |(queue, _)| *queue == index)
        {
            drop(self.pools.give_back(index, relaying));
        }
    }

    /// Whether a back-end that has stopped serving a queue, and says that it would go on at element `next` of the available
    /// ring, has given back all that it had taken: nothing else is written to its buffers.
    pub fn has_all_back(&self, index: QueueIndex, next: u16) -> bool {
        let inherited = self.inherited.as_ref();
        let region = inherited.map_or(&self.region, |inherited| &inherited.region);
        let places = &region.rings()[index.get()];
        places.used_index(&region.memory()) == next
    }

    /// How many requests the back-end is to answer soon.
    pub fn expected(&self) -> usize {
        self.queues
            .iter()
            .flatten()
            .map(|queue| queue.expected)
            .sum()
    }

    /// Whether the queue is relayed.
    pub fn relays(&self, index: QueueIndex) -> bool {
        self.queues[index.get()].is_some()
    }

    /// Whether the back-end is gone, and [`Relay::resume`] is to be called for the next one.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether the back-end has nothing of the queue from before it was stopped.
    pub fn is_settled(&self, index: QueueIndex) -> bool {
        let mut left_behind = self.left_behind.iter();
        left_behind.all(|(queue, _)| *queue != index.get())
    }

    /// The back-end is gone. What it has used is the guest's; what else it had waits for the next one, or has failed.
    pub fn lose(&mut self) {
        if self.is_lost {
            // What was not taken over by now is lost too.
            self.inherited
                .take_if(|inherited| inherited.finished.is_none());
            return;
        }
        // What it says last may be anything.
        let _ = self.gather();
        self.is_lost = true;
        // What waits for that waits for another back-end first.
        self.in_shortage.forget();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let loss = self.rules.loss(index);
            for place in &mut queue.requests {
                if let Some(mut relaying) = place.take_if(|lost| loss.fails(&lost.plan)) {
                    queue.expected -= usize::from(!relaying.plan.receives);
                    loss.answer(&mut relaying, &self.region.memory());
                    self.counters.failed += u64::from(loss.is_failure());
                    self.used.push((index, relaying));
                }
            }
        }
    }

    /// Begins anew for another back-end, in a region of its own, which the last one does not know: with what that has not
    /// used, in the order in which it was offered. It has accepted `VIRTIO_RING_F_EVENT_IDX`, if `event_idx`. False if
    /// something is to be taken out first.
    ///
    /// # Errors
    ///
    /// If the system has not the memory; nothing has changed then.
    pub fn resume(&mut self, event_idx: bool) -> io::Result<bool> {
        self.lose();
        if !self.used.is_empty() || self.inherited.is_some() {
            return Ok(false);
        }
        self.region = self.region.another()?;
        self.event_idx = event_idx;
        self.pools = Pools::new(&self.region);
        self.left_behind.clear();
        for index in 0..self.queues.len() {
            let ring = self.ring(index);
            self.records[index].begin(self.region.name());
            if let Some(queue) = &mut self.queues[index] {
                queue.ring = ring;
                queue.expected = 0;
                let unfinished = queue.requests.iter_mut().filter_map(Option::take);
                let mut unfinished: Vec<Relaying> = unfinished.collect();
                unfinished.sort_unstable_by_key(|relaying| relaying.order);
                for relaying in unfinished.into_iter().rev() {
                    queue.waiting.push_front((relaying.request, relaying.plan));
                }
            }
        }
        self.is_lost = false;
        Ok(true)
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
    fn fail(
        &mut self,
        index: usize,
        mut relaying: Relaying,
        queues: &mut QueueSet,
    ) -> Result<(), DeviceError> {
        self.counters.failed += 1;
        relaying.written = 0;
        self.finish(index, relaying, queues)
    }

    fn finish(
        &mut self,
        index: usize,
        relaying: Relaying,
        queues: &mut QueueSet,
    ) -> Result<(), DeviceError> {
        self.counters.done += 1;
        let written = relaying.written as usize;
        let mut relaying = relaying;
        let descriptors = std::mem::take(&mut relaying.descriptors);
        let (request, _) = self.pools.give_back(index, relaying);
        if let Some(queue) = queues.get(index) {
            queue.complete(request.finish(written))?;
        }
        if !descriptors.is_empty()
            && let Some(queue) = &mut self.queues[index]
        {
            queue.ring.give_back(descriptors);
            self.records[index].deliver();
        }
        Ok(())
    }

    /// Asks back-end and driver to tell of the next thing that they do. True if one of them has done something meanwhile.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the driver's rings cannot be read.
    pub fn prepare_sleep(&mut self, queues: &mut QueueSet) -> Result<bool, DeviceError> {
        if self.in_shortage.holds() || self.out_shortage.holds() {
            return Ok(false);
        }
        let memory = self.region.memory();
        let mut more = false;
        let mut skips = false;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            // One call for half of what it has, if that is much.
            let waits =
                self.rules.alike && self.event_idx && !self.is_lost && queue.expected >= FEW;
            let skip = if waits { queue.expected / 2 } else { 0 };
            more |= !self.is_lost && queue.ring.want_calls(skip, &memory);
            skips |= skip > 0;
            // While requests of a queue wait for room, its kicks would tell of more that wait.
            if queue.waiting.is_empty()
                && let Some(queue) = queues.get(index)
            {
                more |= queue.resume_kicks()?;
            }
        }
        self.look_at = skips.then(|| Instant::now() + SHORTEST_SLEEP);
        Ok(more)
    }

    fn log(&mut self, what: &str, fault: &CopyFault) {
        if self.log_limit.allow() {
            tracing::warn!("{what}: {fault}; it comes back empty");
        }
    }
}
