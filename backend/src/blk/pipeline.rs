//! The stages that requests go through, each stage for as many of them at once as there are.

use super::Disk;
use super::Serial;
use super::blk_request::{BlkRequest, Failure, HEADER_SLOT, Next};
use super::counters::Counters;
use super::header::Status;
use super::io::DiskIo;
use super::ring::RingStock;
use crate::device::{DeviceError, DeviceFailure};
use crate::engine::{Pool, Stopwatch, copy, first_fault};
use crate::log_limit::LogLimit;
use crate::persist::StateArea;
use crate::shortage::Shortage;
use crate::tuning::{CHUNK, DISK_DATA, MAX_COPIES, MAX_REQUESTS};
use crate::virtqueue::{Completion, Request};
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use xen_virtio_guest_mapping::{CopyFault, CopyOp, GuestAccess};

const _: () = assert!(CHUNK <= DISK_DATA);

/// Takes the disk from whoever has had it before, or says that transfers of that one are under way still.
pub type Claim = Box<dyn FnMut() -> Result<(), Box<dyn Error>>>;

/// How long the kernel may take, as a rule, to let go of what a killed process had open.
const USUAL_RELEASE: Duration = Duration::from_secs(1);

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
    /// The disk is to be taken from an earlier process first.
    claim: Option<Claim>,
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
    /// The claim that failed.
    claim_shortage: Shortage,
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
            claim: None,
            reset: false,
            pool: Pool::new(header_slots..bytes),
            io: DiskIo::new(disk, bytes, kept, rings)?,
            serial,
            counters: Counters::default(),
            log_limit: LogLimit::default(),
            copy_shortage: Shortage::default(),
            disk_shortage: Shortage::default(),
            claim_shortage: Shortage::patient(USUAL_RELEASE),
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
        self.claim = None;
        self.claim_shortage.forget();
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
        self.claim = Some(claim);
    }

    /// Takes the disk, if that is still to be done. True if it has just been taken.
    fn take_disk(&mut self) -> bool {
        let Some(claim) = &mut self.claim else {
            return false;
        };
        if self.claim_shortage.holds() {
            return false;
        }
        match claim() {
            Ok(()) => {
                self.claim = None;
                self.claim_shortage.end();
                true
            }
            Err(error) => {
                self.claim_shortage
                    .note("taking the disk over", &*error, Instant::now());
                false
            }
        }
    }

    /// How many more requests fit in: none while transfers of an earlier process, or of a queue that was stopped, are
    /// under way. A write among those that reached the disk after the next driver's first would undo it.
    pub(super) fn room(&self) -> usize {
        if self.left_behind > 0 || self.claim.is_some() {
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
        self.take_disk() | self.repeat() | self.take_ended()
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
        let others = [&self.copy_shortage, &self.claim_shortage];
        let others = others.into_iter().filter_map(Shortage::try_at);
        disk.into_iter().chain(others).min()
    }

    /// What dom0 lacks for it to go on.
    pub(super) fn shortage(&self) -> Option<String> {
        if self.left_behind > 0 {
            return Some(format!(
                "requests wait for {} that the disk has not ended, of a driver or a queue that was stopped",
                self.left_behind
            ));
        }
        let shortages = [
            &self.claim_shortage,
            &self.disk_shortage,
            &self.copy_shortage,
        ];
        shortages.into_iter().find_map(Shortage::warning)
    }

    /// Whether the kernel has something to do.
    pub(super) fn is_waiting(&self) -> bool {
        self.io.in_flight() > 0
    }

    /// Whether the kernel has not taken all that it was given.
    pub(super) fn must_submit(&self) -> bool {
        self.io.must_submit()
    }

    /// Copies out what has ended, or as much of it as takes not too many copies, and hands each finished
    /// request to `complete`, with the number of its queue.
    ///
    /// # Errors
    ///
    /// [`DeviceFailure::Status`] if a request cannot be told how it ended, and those of `complete`.
    pub(super) fn deliver(
        &mut self,
        access: &mut dyn GuestAccess,
        mut complete: impl FnMut(usize, Completion) -> Result<(), DeviceError>,
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
                let completed = complete(queue, request.into_completion());
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
mod tests {
    use super::*;
    use crate::blk::SECTOR;
    use rustix::pipe::pipe;
    use std::cell::Cell;
    use std::fs::File;
    use std::io::Write;
    use std::rc::Rc;
    use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::Bytes;
    use xen_virtio_guest_mapping::{AddressMode, BusAddress, Gref, GuestAddress, PAGE_SIZE, Page};
    use xen_virtio_sim::SimMemory;

    const BLOCK: u32 = 4096;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    #[test]
    fn nothing_is_begun_before_the_disk_is_ones_own() {
        let Some((mut pipeline, _other_end, _)) = hanging() else {
            return;
        };
        let is_free = Rc::new(Cell::new(false));
        let asked = Rc::clone(&is_free);
        pipeline.claim_first(Box::new(move || match asked.get() {
            true => Ok(()),
            false => Err("an earlier worker's transfers".into()),
        }));
        assert!(!pipeline.gather_ended());
        assert_eq!(pipeline.room(), 0);
        let said = pipeline.shortage().unwrap();
        assert!(said.contains("an earlier worker's transfers"), "{said}");
        assert!(pipeline.try_again_at().is_some());
        is_free.set(true);
        gather(&mut pipeline, |pipeline| pipeline.room() > 0);
        assert_eq!((pipeline.shortage(), pipeline.try_again_at()), (None, None));
    }

    /// A request of a simulated guest for the first block of the disk.
    fn read(memory: &SimMemory) -> Request {
        let first = memory.allocate(3).unwrap();
        let header = memory.memory(first, 16).unwrap();
        header.write_obj(VIRTIO_BLK_T_IN.to_le(), 0).unwrap();
        let mut request = Request::new(0);
        let Gref(gref) = memory.grant(first, 3, true);
        for (page, len, flags) in [(0, 16, NEXT), (1, BLOCK, NEXT | WRITE), (2, 1, WRITE)] {
            let page = Page::Grant(Gref(gref + page));
            let GuestAddress(address) = BusAddress { page, offset: 0 }.into();
            request
                .add(Descriptor::new(address, len, flags, 0))
                .unwrap();
        }
        request
    }

    /// A pipeline whose disk is a pipe: a read of it takes as long as the other end says nothing.
    fn hanging() -> Option<(Pipeline, File, StateArea)> {
        let (disk, other_end) = pipe().unwrap();
        let disk = Disk::of_pipe(disk.into(), 8 * u64::from(BLOCK) / SECTOR);
        let rings = RingStock::new(1);
        if rings.take().map(|ring| rings.give_back(ring)).is_none() {
            eprintln!("this kernel gives no io_uring with restrictions: no disk can hang");
            return None;
        }
        let kept = StateArea::private(crate::blk::Blk::KEPT).unwrap();
        let pipeline = Pipeline::new(disk, [0; 20], kept.clone(), &rings).unwrap();
        Some((pipeline, other_end.into(), kept))
    }

    /// Until `done`, at most for a while.
    fn gather(pipeline: &mut Pipeline, done: impl Fn(&Pipeline) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(pipeline) {
            pipeline.gather_ended();
            assert!(Instant::now() < end, "nothing ended");
        }
    }

    #[test]
    fn a_stop_waits_for_nothing_and_what_it_leaves_holds_back_the_next_driver() {
        let Some((mut pipeline, mut other_end, kept)) = hanging() else {
            return;
        };
        let memory = SimMemory::new(64).unwrap();
        let mut access = memory.access(AddressMode::Grants);
        let free = pipeline.pool.free_pages();
        for queue in [0, 0, 1] {
            pipeline.admit(queue, read(&memory), false).unwrap();
        }
        assert!(pipeline.copy_in(&mut access) && pipeline.submit());
        // One that was not begun is forgotten as well.
        pipeline.admit(0, read(&memory), false).unwrap();
        pipeline.forget(0);
        assert_eq!((pipeline.len(), pipeline.room()), (3, 0));
        assert!(!pipeline.is_settled());
        // The first word is that of writes which a flush has lost: none of the next driver's, whichever process it has.
        kept.store(0, 1);
        pipeline.reset();
        assert_eq!(kept.load(0), 0);
        // As a flush of the driver before does that fails late.
        kept.store(0, 1);
        // The first two reads are of the queue that was stopped, the third of the one that runs.
        other_end.write_all(&[7; 3 * BLOCK as usize]).unwrap();
        gather(&mut pipeline, |pipeline| pipeline.is_settled());
        assert_eq!(
            (pipeline.room(), kept.load(0)),
            (usize::from(MAX_REQUESTS) - 1, 0)
        );
        gather(&mut pipeline, Pipeline::has_ended);
        let mut completed = Vec::new();
        let delivered = pipeline.deliver(&mut access, |queue, completion| {
            completed.push((queue, completion.written));
            Ok(())
        });
        delivered.unwrap();
        assert_eq!(completed, [(1, BLOCK + 1)]);
        assert_eq!((pipeline.len(), pipeline.pool.free_pages()), (0, free));
        assert!(free > 3 * BLOCK as usize / PAGE_SIZE);
    }
}
