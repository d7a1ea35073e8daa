//! The stages that requests go through, each stage for as many of them at once as there are.

mod claim;
mod delivery;

use super::Disk;
use super::Serial;
use super::blk_request::{BlkRequest, Failure, HEADER_SLOT, Next};
use super::counters::Counters;
use super::header::Status;
use super::io::DiskIo;
use crate::device::DeviceFailure;
use crate::engine::{Pool, RingStock, Stopwatch, copy, first_fault};
use crate::log_limit::LogLimit;
use crate::persist::StateArea;
use crate::shortage::Shortage;
use crate::tuning::{CHUNK, DISK_DATA, MAX_COPIES, MAX_REQUESTS};
use crate::virtqueue::Request;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyOp, GuestAccess};

const _: () = assert!(CHUNK <= DISK_DATA);

pub use claim::Claim;
use claim::DiskClaim;

/// Requests between the available and the used ring.
pub(super) struct Pipeline {
    requests: Slab<BlkRequest>,
    /// Requests that need memory for their next chunk, in the order in which they came.
    waiting: VecDeque<u16>,
    /// Requests whose chunk is done, held back until they are delivered together.
    ended: Vec<u16>,
    /// Requests whose last transfer failed for want of something in dom0, and whether it is being made again.
    starved: BTreeMap<u16, bool>,
    /// Requests that belong to no queue any more, and whose transfer has not ended.
    left_behind: usize,
    claim: DiskClaim,
    /// When those that are left behind have ended, the driver has been reset: what it was told of lost writes is forgotten.
    reset: bool,
    pool: Pool,
    io: DiskIo,
    serial: Serial,
    counters: Counters,
    log_limit: LogLimit,
    /// What copies wait for, and what transfers do.
    copy_shortage: Shortage,
    disk_shortage: Shortage,
    /// As [`MAX_COPIES`], or fewer, if dom0 had not enough for so many at once.
    most_copies: usize,
    /// Requests that were copied in, by `copies_in`, and are to be submitted.
    batch: Vec<u16>,
    copies_in: Vec<CopyOp>,
    /// Scratch space of [`Pipeline::deliver`].
    copies_out: Vec<CopyOp>,
}

impl Pipeline {
    /// # Errors
    ///
    /// If the system has not the memory.
    pub(super) fn new(
        disk: Disk,
        serial: Serial,
        kept: StateArea,
        rings: &RingStock,
    ) -> io::Result<Self> {
        let header_slots = usize::from(MAX_REQUESTS) * HEADER_SLOT;
        let bytes = header_slots + DISK_DATA;
        let room = usize::from(MAX_REQUESTS);
        Ok(Self {
            requests: Slab::with_capacity(room),
            waiting: VecDeque::with_capacity(room),
            ended: Vec::with_capacity(room),
            starved: BTreeMap::new(),
            left_behind: 0,
            claim: DiskClaim::default(),
            reset: false,
            pool: Pool::new(header_slots..bytes),
            io: DiskIo::new(disk, bytes, kept, rings)?,
            serial,
            counters: Counters::default(),
            log_limit: LogLimit::default(),
            copy_shortage: Shortage::default(),
            disk_shortage: Shortage::default(),
            most_copies: MAX_COPIES,
            batch: Vec::with_capacity(room),
            copies_in: Vec::with_capacity(2 * room),
            copies_out: Vec::with_capacity(2 * room),
        })
    }

    pub(super) fn disk(&self) -> &Disk {
        self.io.disk()
    }

    /// Shows `bytes` of the disk from now on.
    pub(super) fn resize(&mut self, bytes: u64) {
        self.io.resize(bytes);
    }

    /// A new driver begins: its flushes answer for its own writes, and not for what the last one was told is lost,
    /// or would have been told of what is still under way.
    pub(super) fn reset(&mut self) {
        // At once, lest the next process not know of it, and again at the end of what is under way.
        self.io.forget_lost_writes();
        self.reset = self.left_behind > 0;
    }

    /// The transfer of a request that belongs to no queue has ended.
    fn end_left_behind(&mut self, id: u16) {
        self.remove(id);
        self.left_behind -= 1;
        if self.left_behind == 0 && std::mem::take(&mut self.reset) {
            self.io.forget_lost_writes();
        }
    }

    /// See [`DiskIo::retire`].
    pub(super) fn retire(&mut self) {
        self.claim.forget();
        self.io.retire();
    }

    pub(super) fn flush_error(&self) -> Option<(io::Error, bool)> {
        self.io.flush_error()
    }

    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        self.io.events()
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            submissions: self.io.submissions(),
            ..self.counters
        }
    }

    /// Requests that were taken and not given back.
    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// The disk is to be taken by `claim` before anything is begun.
    pub(super) fn claim_first(&mut self, claim: Claim) {
        self.claim.first(claim);
    }

    /// How many more requests fit in: none while transfers of an earlier process, or of a queue that was stopped, are
    /// under way. A write among those that reached the disk after the next driver's first would undo it.
    pub(super) fn room(&self) -> usize {
        if self.left_behind > 0 || self.claim.is_pending() {
            return 0;
        }
        usize::from(MAX_REQUESTS) - self.len()
    }

    /// Whether nothing is under way that a stop has left.
    pub(super) fn is_settled(&self) -> bool {
        self.left_behind == 0
    }

    /// Takes a request in, if there is room.
    ///
    /// # Errors
    ///
    /// [`DeviceFailure::NoStatus`].
    pub(super) fn admit(
        &mut self,
        queue: usize,
        request: Request,
        write_through: bool,
    ) -> Result<(), DeviceFailure> {
        let entry = self.requests.vacant_entry();
        let id = u16::try_from(entry.key()).expect("fewer than MAX_REQUESTS");
        entry.insert(BlkRequest::new(queue, request, id, write_through)?);
        self.waiting.push_back(id);
        Ok(())
    }

    /// Copies in a batch: as many of the waiting chunks as there is memory for, and as take not too many
    /// copies. True if there were any.
    pub(super) fn copy_in(&mut self, access: &mut dyn GuestAccess) -> bool {
        if self.copy_shortage.holds() {
            return false;
        }
        self.copies_in.clear();
        while let Some(&id) = self.waiting.front()
            && self.copies_in.len() < self.most_copies
        {
            let request = &mut self.requests[usize::from(id)];
            let run = match request.room() {
                0 => None,
                room => match self.pool.take(room) {
                    None => break,
                    run => run,
                },
            };
            request.begin_chunk(run);
            request.plan_copies_in(&mut self.copies_in);
            self.batch.push(id);
            self.waiting.pop_front();
        }
        if self.batch.is_empty() {
            return false;
        }
        let time = &mut self.counters.time;
        let mut stopwatch = Stopwatch::start(&mut time.batches);
        let copied = copy(access, &self.io.memory(), &mut self.copies_in);
        stopwatch.stop(&mut time.copy_in);
        match copied {
            Ok(()) => {
                self.copy_shortage.end();
                self.most_copies = MAX_COPIES;
                true
            }
            Err(fault) => {
                self.put_back();
                self.most_copies = (self.copies_in.len() / 2).max(1);
                self.copy_shortage
                    .note("reading the guest's memory", &fault, Instant::now());
                false
            }
        }
    }

    /// The batch waits again, in its order.
    fn put_back(&mut self) {
        while let Some(id) = self.batch.pop() {
            if let Some(run) = self.requests[usize::from(id)].chunk.run.take() {
                self.pool.give_back(run);
            }
            self.waiting.push_front(id);
        }
    }

    /// Hands the batch that was copied in to the disk. True if there was one.
    pub(super) fn submit(&mut self) -> bool {
        if self.batch.is_empty() {
            return false;
        }
        let mut stopwatch = Stopwatch::start(&mut self.counters.time.submissions);
        let batch = std::mem::take(&mut self.batch);
        for &id in &batch {
            let request = &mut self.requests[usize::from(id)];
            let next = match first_fault(&self.copies_in[request.chunk.copies.clone()]) {
                None => request.execute(&self.io.memory(), self.io.disk(), &self.serial),
                Some(fault) => {
                    self.log("a request's data cannot be read from the guest", &fault);
                    Err(Failure::Guest(Status::IoError))
                }
            };
            self.go_on(id, next);
        }
        self.batch = batch;
        self.batch.clear();
        self.io.submit();
        stopwatch.stop(&mut self.counters.time.submit);
        true
    }

    fn go_on(&mut self, id: u16, next: Result<Next, Failure>) {
        match next {
            Ok(Next::Disk(transfer)) => self.io.begin(transfer),
            Ok(Next::CopyOut) => self.ended.push(id),
            Err(failure) => {
                let status = match failure {
                    Failure::Guest(status) => status,
                    Failure::Disk(error) => {
                        self.log("the disk failed", &error);
                        Status::IoError
                    }
                };
                self.requests[usize::from(id)].fail(status);
                self.ended.push(id);
            }
        }
    }

    /// Takes up what the disk has done. True if it has done something.
    pub(super) fn gather_ended(&mut self) -> bool {
        self.claim.take() | self.repeat() | self.take_ended()
    }

    fn take_ended(&mut self) -> bool {
        let mut any = false;
        while let Some((id, result)) = self.io.next_ended() {
            any = true;
            if self.requests[usize::from(id)].queue.is_none() {
                self.end_left_behind(id);
                continue;
            }
            match result {
                Err(error) if is_dom0s(&error) => {
                    self.starved.insert(id, false);
                    self.disk_shortage
                        .note("a transfer of the disk", &error, Instant::now());
                }
                result => {
                    if self.starved.remove(&id).is_some() && self.starved.is_empty() {
                        self.disk_shortage.end();
                    }
                    let next = self.requests[usize::from(id)].moved(result);
                    self.go_on(id, next);
                }
            }
        }
        self.io.submit();
        any
    }

    /// Makes the transfers again that dom0 had no room for. True if there were any.
    fn repeat(&mut self) -> bool {
        if self.starved.is_empty() || self.disk_shortage.holds() {
            return false;
        }
        let waiting = self.starved.iter_mut().filter(|(_, again)| !**again);
        let ids: Vec<u16> = waiting
            .map(|(id, again)| {
                *again = true;
                *id
            })
            .collect();
        for &id in &ids {
            // As one that was interrupted: nothing was moved.
            let next = self.requests[usize::from(id)].moved(Err(io::ErrorKind::Interrupted.into()));
            self.go_on(id, next);
        }
        !ids.is_empty()
    }

    /// Whether what has ended is to be delivered now: at least half of what is under way. So one alone
    /// never waits, and many are not delivered one by one.
    pub(super) fn is_due(&self) -> bool {
        self.has_ended() && self.ended.len() >= self.io.in_flight()
    }

    /// Whether something can be delivered.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty() && !self.copy_shortage.holds()
    }

    /// When to go on with what dom0 lacked something for.
    pub(super) fn try_again_at(&self) -> Option<Instant> {
        let disk = self.starved.values().any(|again| !again);
        let disk = disk.then(|| self.disk_shortage.try_at()).flatten();
        let others = [self.copy_shortage.try_at(), self.claim.try_at()];
        disk.into_iter().chain(others.into_iter().flatten()).min()
    }

    /// What dom0 lacks for it to go on.
    pub(super) fn shortage(&self) -> Option<String> {
        if self.left_behind > 0 {
            return Some(format!(
                "requests wait for {} that the disk has not ended, of a driver or a queue that was stopped",
                self.left_behind
            ));
        }
        self.claim
            .warning()
            .or_else(|| self.disk_shortage.warning())
            .or_else(|| self.copy_shortage.warning())
    }

    /// Whether the kernel has something to do.
    pub(super) fn is_waiting(&self) -> bool {
        self.io.in_flight() > 0
    }

    /// Whether the kernel has not taken all that it was given.
    pub(super) fn must_submit(&self) -> bool {
        self.io.must_submit()
    }

    /// Forgets what came from queue `queue`, at once. A transfer that is under way keeps its memory, and ends some time;
    /// until then no further request is admitted, see [`Pipeline::room`].
    pub(super) fn forget(&mut self, queue: usize) {
        let requests = &self.requests;
        let mut idle = Vec::new();
        let mut keep = |id: u16, is_under_way: bool| {
            let keep = requests[usize::from(id)].queue != Some(queue);
            if !keep && !is_under_way {
                idle.push(id);
            }
            keep
        };
        self.waiting.retain(|id| keep(*id, false));
        self.ended.retain(|id| keep(*id, false));
        self.batch.retain(|id| keep(*id, false));
        self.starved
            .retain(|id, is_under_way| keep(*id, *is_under_way));
        for id in idle {
            self.remove(id);
        }
        for (_, request) in &mut self.requests {
            if request.queue == Some(queue) {
                request.queue = None;
                self.left_behind += 1;
            }
        }
        if self.starved.is_empty() {
            self.disk_shortage.forget();
        }
        if self.waiting.is_empty() && self.ended.is_empty() {
            self.copy_shortage.forget();
        }
    }

    /// Removes a request of which nothing is under way.
    fn remove(&mut self, id: u16) {
        if let Some(run) = self.requests.remove(id.into()).chunk.run {
            self.pool.give_back(run);
        }
    }

    fn log(&mut self, what: &str, error: &dyn Error) {
        if self.log_limit.allow() {
            tracing::warn!("{what}: {error}; the guest is told of an I/O error");
        }
    }
}

/// Whether a transfer failed for what dom0 lacks now, and may have later: memory, or room for what a sparse image or its
/// file system has not allocated yet. A failed flush is none of these: what it says is said once.
fn is_dom0s(error: &io::Error) -> bool {
    let errnos = [libc::ENOMEM, libc::EAGAIN, libc::ENOSPC, libc::EDQUOT];
    error
        .raw_os_error()
        .is_some_and(|errno| errnos.contains(&errno))
}

#[cfg(test)]
mod tests;
