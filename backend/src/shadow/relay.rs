//! Requests on their way from a guest's queues to a back-end's, and back.

mod holding;
mod incoming;
mod inherited;
mod lifetime;
mod outgoing;

use super::loss::Rules;
use super::pools::Pools;
use super::record::ShadowRecord;
use super::region::Region;
use super::relaying::{Plan, Relaying};
use super::ring::{BackendFault, ShadowRing};
use crate::device::{DeviceError, RequestCounters};
use crate::log_limit::LogLimit;
use crate::shortage::Shortage;
use crate::tuning::{MAX_COPIES, SHORTEST_SLEEP};
use crate::virtqueue::{QueueIndex, QueueSet, Request};
use holding::{FEW, Holding};
use inherited::Inherited;
use std::collections::VecDeque;
use std::io;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, CopyOp};

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
    /// The one that the next back-end is to have.
    next_region: Option<Region>,
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
    /// An earlier process's back-end has let go of its queues, and serves none of this one yet.
    is_taken_over: bool,
    /// … and is gone: what tells the driver of a loss is due.
    tells_of_loss: bool,
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
            is_taken_over: false,
            tells_of_loss: false,
            pools: Pools::new(&region),
            queues: sizes.iter().map(|_| None).collect(),
            region,
            next_region: None,
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

    /// The next back-end is to have this region, of queues and a pool as this one's.
    pub fn have_next(&mut self, region: Region) {
        self.next_region = Some(region);
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
