//! Where a disk's transfers are carried out: io_uring, or one call each where the kernel has none for us.

use super::disk::Disk;
use super::ring::RingStock;
use crate::persist::StateArea;
use crate::tuning::MAX_REQUESTS;
use io_uring::{IoUring, opcode, types};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::slice;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::syscalls;

/// The disk and the memory among what the ring has registered: the kernel looks neither up again.
const DISK: types::Fixed = types::Fixed(0);
const MEMORY: u16 = 0;
/// Marks the flush among what ends; the others have their id.
const FLUSH: u64 = u64::MAX;

/// Words that outlive this process. The first is not zero once a flush has failed, until the driver resets the
/// device: a later one would say that all is well.
const LOST_WRITES: usize = 0;
/// The errno of the last flush that failed, zero if none has.
const FLUSH_ERROR: usize = 1;

/// What is asked of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Everything that was written is on stable storage when this ends.
    Flush,
}

/// One transfer between the disk and a part of [`DiskIo`]'s memory, which is the transfer's until it ends.
#[derive(Clone, Debug)]
pub(super) struct Transfer {
    /// Tells this transfer from others in flight.
    pub(super) id: u16,
    pub(super) kind: Kind,
    /// Byte of the disk.
    pub(super) offset: u64,
    pub(super) place: Range<usize>,
}

/// A transfer that ended, and the bytes that it moved.
pub(super) type Ended = (u16, io::Result<usize>);

/// A disk and the memory that its transfers use.
pub(super) struct DiskIo {
    engine: Engine,
    /// Where the engine's ring came from, and goes back to.
    rings: RingStock,
    ended: VecDeque<Ended>,
    in_flight: usize,
    submissions: u64,
    /// The flushes that one in the kernel stands for, and those that wait for the next one: Linux tells of
    /// lost pages once, so two at the same time could not both know.
    flushing: Vec<u16>,
    flush_next: Vec<u16>,
    /// `None` once the device was taken away: the words are another one's.
    kept: Option<StateArea>,
    disk: Disk,
    memory: MmapRegion<()>,
}

enum Engine {
    Uring {
        ring: Box<IoUring>,
        /// Entries in the submission queue that the kernel has not taken.
        unsubmitted: usize,
    },
    Blocking(Vec<Transfer>),
}

impl DiskIo {
    /// `bytes` of memory, and room for [`MAX_REQUESTS`] transfers at once. They go through a ring of `rings`, if
    /// one is left.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub(super) fn new(
        disk: Disk,
        bytes: usize,
        kept: StateArea,
        rings: &RingStock,
    ) -> io::Result<Self> {
        let memory = MmapRegion::new(bytes).map_err(io::Error::other)?;
        let engine = match uring(&disk, &memory, rings) {
            Some(ring) => Engine::Uring {
                ring: Box::new(ring),
                unsubmitted: 0,
            },
            None => Engine::Blocking(Vec::with_capacity(MAX_REQUESTS.into())),
        };
        Ok(Self {
            engine,
            rings: rings.clone(),
            ended: VecDeque::with_capacity(MAX_REQUESTS.into()),
            in_flight: 0,
            submissions: 0,
            flushing: Vec::new(),
            flush_next: Vec::new(),
            kept: Some(kept),
            disk,
            memory,
        })
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Shows `bytes` of the disk from now on.
    pub(super) fn resize(&mut self, bytes: u64) {
        self.disk.set_bytes(bytes);
    }

    pub(super) fn memory(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }

    /// Transfers begun that [`DiskIo::next_ended`] has not returned.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn submissions(&self) -> u64 {
        self.submissions
    }

    /// Readable when a transfer has ended.
    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        match &self.engine {
            // SAFETY: the ring keeps its descriptor open as long as it lives.
            Engine::Uring { ring, .. } => Some(unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }),
            Engine::Blocking(_) => None,
        }
    }

    /// Begins a transfer at the next [`DiskIo::submit`].
    ///
    /// # Panics
    ///
    /// If more transfers are in flight than there is room for.
    pub(super) fn begin(&mut self, transfer: Transfer) {
        self.in_flight += 1;
        if transfer.kind == Kind::Flush && self.disk.read_only() {
            // There is nothing that could be lost, and some devices refuse to look.
            self.ended.push_back((transfer.id, Ok(0)));
        } else if transfer.kind == Kind::Flush {
            self.flush_next.push(transfer.id);
            self.begin_flush();
        } else {
            self.push(transfer);
        }
    }

    /// Begins a flush for those that wait, unless one is in the kernel.
    fn begin_flush(&mut self) {
        if !self.flushing.is_empty() || self.flush_next.is_empty() {
            return;
        }
        std::mem::swap(&mut self.flushing, &mut self.flush_next);
        if self.has_lost_writes() {
            self.end_flush(Err(io::Error::other(
                "an earlier flush failed, and what it lost is gone",
            )));
            return;
        }
        self.push(Transfer {
            id: 0,
            kind: Kind::Flush,
            offset: 0,
            place: 0..0,
        });
    }

    /// Ends all the flushes that one stood for, and begins the next.
    fn end_flush(&mut self, result: io::Result<usize>) {
        if let Err(error) = &result
            && let Some(kept) = &self.kept
        {
            if !self.has_lost_writes() {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                kept.store(FLUSH_ERROR, u64::from(errno.unsigned_abs()));
            }
            kept.store(LOST_WRITES, 1);
        }
        let message = result.err().map(|error| error.to_string());
        for id in self.flushing.drain(..) {
            let result = match &message {
                None => Ok(0),
                Some(message) => Err(io::Error::other(message.clone())),
            };
            self.ended.push_back((id, result));
        }
        self.begin_flush();
    }

    /// A new driver begins: its flushes answer for its own writes, and not for what the last one was told is lost.
    pub(super) fn forget_lost_writes(&mut self) {
        if let Some(kept) = &self.kept {
            kept.store(LOST_WRITES, 0);
        }
    }

    /// The device was taken away: what it keeps beyond this process is not its own any more.
    pub(super) fn retire(&mut self) {
        self.kept = None;
    }

    fn has_lost_writes(&self) -> bool {
        let kept = self.kept.as_ref();
        kept.is_some_and(|kept| kept.load(LOST_WRITES) != 0)
    }

    /// The error of the last flush that failed, whichever process it failed in, and whether flushes fail still.
    pub(super) fn flush_error(&self) -> Option<(io::Error, bool)> {
        let holds = self.has_lost_writes();
        let errno = match i32::try_from(self.kept.as_ref()?.load(FLUSH_ERROR)).ok()? {
            // An earlier version has not noted which.
            0 if holds => libc::EIO,
            errno => errno,
        };
        (errno != 0).then(|| (io::Error::from_raw_os_error(errno), holds))
    }

    fn push(&mut self, transfer: Transfer) {
        match &mut self.engine {
            Engine::Blocking(waiting) => waiting.push(transfer),
            Engine::Uring { ring, unsubmitted } => {
                let Transfer {
                    id,
                    kind,
                    offset,
                    place,
                } = transfer;
                let part = part(&self.memory, &place);
                let (start, len) = (part.ptr_guard_mut().as_ptr(), transfer_len(&place));
                let entry = match kind {
                    Kind::Read => opcode::ReadFixed::new(DISK, start, len, MEMORY)
                        .offset(offset)
                        .build(),
                    Kind::Write => opcode::WriteFixed::new(DISK, start, len, MEMORY)
                        .offset(offset)
                        .build(),
                    Kind::Flush => opcode::Fsync::new(DISK)
                        .flags(types::FsyncFlags::DATASYNC)
                        .build(),
                };
                let entry = entry.user_data(match kind {
                    Kind::Flush => FLUSH,
                    Kind::Read | Kind::Write => id.into(),
                });
                // SAFETY: the kernel holds the file and the memory's pages, which are registered, until the transfer has
                // ended. The part of the memory is the transfer's until then.
                unsafe { ring.submission().push(&entry) }.expect("room for every transfer");
                *unsubmitted += 1;
            }
        }
    }

    /// Hands to the kernel what was begun. What it does not take now, it is given at the next call.
    pub(super) fn submit(&mut self) {
        match &mut self.engine {
            Engine::Uring { unsubmitted: 0, .. } => {}
            Engine::Uring { ring, unsubmitted } => {
                self.submissions += 1;
                syscalls::count();
                match ring.submit() {
                    Ok(taken) => *unsubmitted -= taken,
                    Err(error) => tracing::debug!("io_uring takes nothing now: {error}"),
                }
            }
            Engine::Blocking(waiting) => {
                for transfer in std::mem::take(waiting) {
                    self.submissions += 1;
                    syscalls::count();
                    let result = perform(&self.disk, &self.memory, &transfer);
                    match transfer.kind {
                        Kind::Flush => self.end_flush(result),
                        Kind::Read | Kind::Write => self.ended.push_back((transfer.id, result)),
                    }
                }
            }
        }
    }

    /// Whether the kernel has not taken all that was begun.
    pub(super) fn must_submit(&self) -> bool {
        match &self.engine {
            Engine::Uring { unsubmitted, .. } => *unsubmitted > 0,
            Engine::Blocking(waiting) => !waiting.is_empty(),
        }
    }

    /// The next transfer that has ended, if there is one.
    pub(super) fn next_ended(&mut self) -> Option<Ended> {
        if self.ended.is_empty() {
            self.collect();
        }
        let ended = self.ended.pop_front()?;
        self.in_flight -= 1;
        Some(ended)
    }

    fn collect(&mut self) {
        let Engine::Uring { ring, .. } = &mut self.engine else {
            return;
        };
        let mut flush = None;
        for entry in ring.completion() {
            let (data, code) = (entry.user_data(), entry.result());
            let result = usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code));
            if data == FLUSH {
                flush = Some(result);
            } else {
                let id = u16::try_from(data).expect("an id that begin gave");
                self.ended.push_back((id, result));
            }
        }
        if let Some(result) = flush {
            self.end_flush(result);
        }
    }
}

impl Drop for DiskIo {
    /// Waits for nothing: a transfer that is under way has the pages of the memory and the file to itself until it ends,
    /// whether this process lives or not, and the ring that it came by is not used again.
    fn drop(&mut self) {
        self.collect();
        let engine = std::mem::replace(&mut self.engine, Engine::Blocking(Vec::new()));
        if let Engine::Uring { ring, .. } = engine
            && self.ended.len() == self.in_flight
        {
            self.rings.give_back(*ring);
        }
    }
}

/// A ring of `rings` that knows the disk as [`DISK`] and the memory as [`MEMORY`].
fn uring(disk: &Disk, memory: &MmapRegion<()>, rings: &RingStock) -> Option<IoUring> {
    let ring = rings.take()?;
    match register(&ring, disk, memory) {
        Ok(()) => Some(ring),
        Err(error) => {
            tracing::info!(
                "io_uring does not take the disk ({error}): it holds its guest up while it is slow"
            );
            rings.give_back(ring);
            None
        }
    }
}

fn register(ring: &IoUring, disk: &Disk, memory: &MmapRegion<()>) -> io::Result<()> {
    ring.submitter()
        .register_files(&[disk.file().as_raw_fd()])?;
    let whole = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: memory.size(),
    };
    // SAFETY: the kernel has the pages pinned for as long as the ring knows them, or a transfer uses them: they may be
    // unmapped before.
    unsafe { ring.submitter().register_buffers(&[whole]) }
}

fn part<'a>(memory: &'a MmapRegion<()>, place: &Range<usize>) -> VolatileSlice<'a> {
    memory
        .get_slice(place.start, place.len())
        .expect("a transfer's place is in the memory")
}

fn transfer_len(place: &Range<usize>) -> u32 {
    place.len().try_into().expect("the memory is small")
}

/// Carries a transfer out at once.
fn perform(disk: &Disk, memory: &MmapRegion<()>, transfer: &Transfer) -> io::Result<usize> {
    let file = disk.file().as_fd();
    let part = part(memory, &transfer.place);
    let start = part.ptr_guard_mut().as_ptr();
    // SAFETY: within the memory; this part of it is the transfer's, which ends in this function.
    let bytes = unsafe { slice::from_raw_parts_mut(start, part.len()) };
    Ok(match transfer.kind {
        Kind::Read => rustix::io::pread(file, bytes, transfer.offset)?,
        Kind::Write => rustix::io::pwrite(file, bytes, transfer.offset)?,
        Kind::Flush => {
            rustix::fs::fdatasync(file)?;
            0
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::Blk;
    use super::*;
    use io_uring::squeue;
    use vm_memory::Bytes;

    fn disk_io(bytes: &[u8], uring: bool) -> (tempfile::NamedTempFile, DiskIo) {
        disk_io_of(bytes, &RingStock::new(usize::from(uring)))
    }

    fn disk_io_of(bytes: &[u8], rings: &RingStock) -> (tempfile::NamedTempFile, DiskIo) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let disk = Disk::open(file.path(), false).unwrap();
        let kept = StateArea::private(Blk::KEPT).unwrap();
        let io = DiskIo::new(disk, 1 << 16, kept, rings).unwrap();
        (file, io)
    }

    fn has_ring(io: &DiskIo) -> bool {
        matches!(io.engine, Engine::Uring { .. })
    }

    /// Whether this machine's kernel gives rings. A test that wants one says if it does not.
    fn kernel_gives_rings() -> bool {
        let given = RingStock::new(1).take().is_some();
        if !given {
            eprintln!(
                "this kernel gives no io_uring with restrictions: only the other engine is tested"
            );
        }
        given
    }

    fn transfer(id: u16, kind: Kind, offset: u64, place: Range<usize>) -> Transfer {
        Transfer {
            id,
            kind,
            offset,
            place,
        }
    }

    /// Until everything in flight has ended.
    fn wait_all(io: &mut DiskIo) {
        while io.ended.len() < io.in_flight {
            io.submit();
            io.collect();
        }
    }

    fn results(io: &mut DiskIo) -> Vec<(u16, Option<usize>)> {
        wait_all(io);
        let mut results: Vec<_> = std::iter::from_fn(|| io.next_ended())
            .map(|(id, result)| (id, result.ok()))
            .collect();
        results.sort_unstable();
        results
    }

    #[test]
    fn both_engines_move_bytes_and_tell_of_errors() {
        for uring in [true, false] {
            let (file, mut io) = disk_io(&[7; 8192], uring);
            io.memory().write_slice(&[9; 512], 4096).unwrap();
            io.begin(transfer(1, Kind::Write, 512, 4096..4608));
            io.begin(transfer(2, Kind::Read, 4096, 0..512));
            io.begin(transfer(3, Kind::Flush, 0, 0..0));
            io.begin(transfer(4, Kind::Read, 8192, 512..1024));
            io.submit();
            let expected = [(1, Some(512)), (2, Some(512)), (3, Some(0)), (4, Some(0))];
            assert_eq!(results(&mut io), expected, "uring {uring}");
            assert_eq!(io.in_flight(), 0);
            let mut read = [0; 512];
            io.memory().read_slice(&mut read, 0).unwrap();
            assert_eq!(read, [7; 512]);
            assert_eq!(std::fs::read(file.path()).unwrap()[512..1024], [9; 512]);
        }
    }

    #[test]
    fn a_flush_after_a_failed_one_fails_until_a_new_driver_begins() {
        for uring in [true, false] {
            let (_file, mut io) = disk_io(&[0; 4096], uring);
            assert!(io.flush_error().is_none());
            io.flushing.push(4);
            io.in_flight += 1;
            io.end_flush(Err(io::Error::from_raw_os_error(libc::ENOSPC)));
            io.begin(transfer(5, Kind::Flush, 0, 0..0));
            io.begin(transfer(6, Kind::Read, 0, 0..512));
            assert_eq!(
                results(&mut io),
                [(4, None), (5, None), (6, Some(512))],
                "uring {uring}"
            );
            io.forget_lost_writes();
            io.begin(transfer(7, Kind::Flush, 0, 0..0));
            assert_eq!(results(&mut io), [(7, Some(0))], "uring {uring}");
            // The reason stays for whoever looks.
            let (error, holds) = io.flush_error().unwrap();
            assert_eq!((error.raw_os_error(), holds), (Some(libc::ENOSPC), false));
        }
    }

    #[test]
    fn a_flush_of_what_cannot_be_dirty_succeeds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = Disk::open(file.path(), true).unwrap();
        let kept = StateArea::private(Blk::KEPT).unwrap();
        kept.store(LOST_WRITES, 1);
        let mut io = DiskIo::new(disk, 1 << 16, kept, &RingStock::new(1)).unwrap();
        io.begin(transfer(1, Kind::Flush, 0, 0..0));
        assert_eq!(results(&mut io), [(1, Some(0))]);
    }

    #[test]
    fn flushes_at_once_share_their_fate() {
        for uring in [true, false] {
            let (_file, mut io) = disk_io(&[0; 4096], uring);
            for id in 0..5 {
                io.begin(transfer(id, Kind::Flush, 0, 0..0));
            }
            // The first is in the kernel, and fails; those behind it must not succeed after it.
            assert_eq!((io.flushing.len(), io.flush_next.len()), (1, 4));
            io.end_flush(Err(io::ErrorKind::Other.into()));
            assert_eq!(io.ended.len(), 5);
            assert!(io.ended.iter().all(|(_, result)| result.is_err()));
            // What the kernel says of the one that was pushed concerns nobody any more.
            wait_all(&mut io);
        }
    }

    /// What the kernel says of `entry`.
    fn result(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
        // SAFETY: the entries of the tests use no memory but a path, which is a constant.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_does_nothing_but_a_disks_transfers() {
        if !kernel_gives_rings() {
            assert!(!has_ring(&disk_io(&[0; 4096], true).1));
            return;
        }
        let mut ring = RingStock::new(1).take().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = file.as_file().as_raw_fd();
        ring.submitter().register_files(&[fd]).unwrap();
        assert_eq!(result(&mut ring, &opcode::Fsync::new(DISK).build()), 0);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0);
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr());
        let fixed = squeue::Flags::FIXED_FILE;
        for (what, entry) in [
            ("a socket", socket.build().flags(fixed)),
            ("a path", open.build().flags(fixed)),
            ("nothing", opcode::Nop::new().build().flags(fixed)),
            ("a descriptor", opcode::Fsync::new(types::Fd(fd)).build()),
            (
                "a link",
                opcode::Fsync::new(DISK)
                    .build()
                    .flags(squeue::Flags::IO_LINK),
            ),
        ] {
            assert_eq!(result(&mut ring, &entry), -libc::EACCES, "{what}");
        }
        let refused = ring.submitter().register_eventfd(fd).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        let again = ring.submitter().register_restrictions(&mut []).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_ring_goes_from_one_disk_to_the_next() {
        let given = kernel_gives_rings();
        let rings = RingStock::new(1);
        for round in 1..4 {
            let (_file, mut io) = disk_io_of(&[round; 4096], &rings);
            assert_eq!(has_ring(&io), given);
            // While it is taken, another disk goes without.
            assert!(!has_ring(&disk_io_of(&[0; 4096], &rings).1));
            io.begin(transfer(0, Kind::Read, 0, 0..512));
            assert_eq!(results(&mut io), [(0, Some(512))]);
            let mut read = [0; 512];
            io.memory().read_slice(&mut read, 0).unwrap();
            assert_eq!(read, [round; 512]);
        }
    }

    #[test]
    fn a_ring_with_entries_of_its_last_disk_is_given_up() {
        let rings = RingStock::new(1);
        let Some(mut ring) = rings.take() else {
            assert!(!kernel_gives_rings());
            return;
        };
        // SAFETY: the kernel never sees the entry.
        unsafe { ring.submission().push(&opcode::Fsync::new(DISK).build()) }.unwrap();
        rings.give_back(ring);
        assert!(rings.take().is_none());
    }

    /// They may be another device's by then.
    #[test]
    fn a_disk_that_was_taken_away_leaves_its_words_alone() {
        let (_file, mut io) = disk_io(&[0; 4096], false);
        let kept = io.kept.clone().unwrap();
        io.retire();
        io.end_flush(Err(io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!(kept.load(LOST_WRITES), 0);
        kept.store(LOST_WRITES, 1);
        io.forget_lost_writes();
        assert_eq!(kept.load(LOST_WRITES), 1);
    }

    #[test]
    fn a_disk_that_goes_waits_for_no_transfer() {
        if !kernel_gives_rings() {
            return;
        }
        let (disk, _other_end) = rustix::pipe::pipe().unwrap();
        let disk = Disk::of_pipe(disk.into(), 8);
        let rings = RingStock::new(1);
        let kept = StateArea::private(Blk::KEPT).unwrap();
        let mut io = DiskIo::new(disk, 1 << 16, kept, &rings).unwrap();
        io.begin(transfer(0, Kind::Read, 0, 0..512));
        io.submit();
        drop(io);
        // The ring may tell of the transfer some time: nobody else has it.
        assert!(rings.take().is_none());
    }
}
