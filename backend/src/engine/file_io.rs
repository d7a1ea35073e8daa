//! Transfers between a file and a memory of ours: through io_uring, or by one call each where the kernel has none for us.

use super::rings::RingStock;
use crate::tuning::MAX_REQUESTS;
use io_uring::{IoUring, opcode, types};
use rustix::fs::FallocateFlags;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::slice;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::syscalls;

/// The file and the memory among what the ring has registered: the kernel looks neither up again.
const FILE: types::Fixed = types::Fixed(0);
const MEMORY: u16 = 0;

/// What is asked of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    /// Everything that was written is on stable storage when this ends.
    Flush,
    /// As many bytes are zeros when this ends, and take no room if they `may_go`.
    Erase {
        bytes: u64,
        may_go: bool,
    },
}

/// How fallocate(2) is to erase what `may_go`, or is to stay.
const fn erasing(may_go: bool) -> FallocateFlags {
    let how = match may_go {
        true => FallocateFlags::PUNCH_HOLE,
        false => FallocateFlags::ZERO_RANGE,
    };
    how.union(FallocateFlags::KEEP_SIZE)
}

/// One transfer between the file and a part of [`FileIo`]'s memory, which is the transfer's until it ends.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    /// Tells this transfer from others in flight.
    pub(crate) id: u16,
    pub(crate) kind: Kind,
    /// Byte of the file.
    pub(crate) offset: u64,
    pub(crate) place: Range<usize>,
}

/// A transfer that ended, and the bytes that it moved.
pub(crate) type Ended = (u16, io::Result<usize>);

/// The memory that transfers of a file use, and those under way.
pub(crate) struct FileIo {
    engine: Engine,
    /// Where the engine's ring came from, and goes back to.
    rings: RingStock,
    ended: VecDeque<Ended>,
    in_flight: usize,
    submissions: u64,
    /// `RWF_…` of each read and write.
    flags: i32,
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

impl FileIo {
    /// `bytes` of memory, and room for [`MAX_REQUESTS`] transfers of `file` at once. They go through a ring of `rings`, if
    /// one is left.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub(crate) fn new(file: BorrowedFd<'_>, bytes: usize, rings: &RingStock) -> io::Result<Self> {
        let memory = MmapRegion::new(bytes).map_err(io::Error::other)?;
        let engine = match uring(file, &memory, rings) {
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
            flags: 0,
            memory,
        })
    }

    /// Has the page cache keep nothing of what is read and written (`RWF_DONTCACHE`), of a file that takes that.
    pub(crate) fn keep_nothing_cached(&mut self) {
        self.flags |= libc::RWF_DONTCACHE;
    }

    pub(crate) fn memory(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }

    pub(crate) fn submissions(&self) -> u64 {
        self.submissions
    }

    /// Readable when a transfer has ended.
    pub(crate) fn events(&self) -> Option<BorrowedFd<'_>> {
        match &self.engine {
            // SAFETY: the ring keeps its descriptor open as long as it lives.
            Engine::Uring { ring, .. } => Some(unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }),
            Engine::Blocking(_) => None,
        }
    }

    /// Begins a transfer at the next [`FileIo::submit`].
    ///
    /// # Panics
    ///
    /// If more transfers are in flight than there is room for.
    pub(crate) fn begin(&mut self, transfer: Transfer) {
        self.in_flight += 1;
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
                    Kind::Read => opcode::ReadFixed::new(FILE, start, len, MEMORY)
                        .offset(offset)
                        .rw_flags(self.flags)
                        .build(),
                    Kind::Write => opcode::WriteFixed::new(FILE, start, len, MEMORY)
                        .offset(offset)
                        .rw_flags(self.flags)
                        .build(),
                    Kind::Flush => opcode::Fsync::new(FILE)
                        .flags(types::FsyncFlags::DATASYNC)
                        .build(),
                    Kind::Erase { bytes, may_go } => opcode::Fallocate::new(FILE, bytes)
                        .offset(offset)
                        .mode(erasing(may_go).bits().cast_signed())
                        .build(),
                };
                let entry = entry.user_data(id.into());
                // SAFETY: the kernel holds the file and the memory's pages, which are registered, until the transfer has
                // ended. The part of the memory is the transfer's until then.
                unsafe { ring.submission().push(&entry) }.expect("room for every transfer");
                *unsubmitted += 1;
            }
        }
    }

    /// Hands to the kernel what was begun, of the `file` that this is for. What it does not take now, it is given at the next
    /// call.
    pub(crate) fn submit(&mut self, file: BorrowedFd<'_>) {
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
                // Up to a flush: what that says is to be known before anything else is done.
                let flush = |transfer: &Transfer| transfer.kind == Kind::Flush;
                let count = waiting
                    .iter()
                    .position(flush)
                    .map_or(waiting.len(), |place| place + 1);
                for transfer in waiting.drain(..count) {
                    self.submissions += 1;
                    syscalls::count();
                    let result = perform(file, &self.memory, &transfer);
                    self.ended.push_back((transfer.id, result));
                }
            }
        }
    }

    /// Whether the kernel has not taken all that was begun.
    pub(crate) fn must_submit(&self) -> bool {
        match &self.engine {
            Engine::Uring { unsubmitted, .. } => *unsubmitted > 0,
            Engine::Blocking(waiting) => !waiting.is_empty(),
        }
    }

    /// The next transfer that has ended, if there is one.
    pub(crate) fn next_ended(&mut self) -> Option<Ended> {
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
        for entry in ring.completion() {
            let (data, code) = (entry.user_data(), entry.result());
            let result = usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code));
            let id = u16::try_from(data).expect("an id that begin gave");
            self.ended.push_back((id, result));
        }
    }
}

impl Drop for FileIo {
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

/// A ring of `rings` that knows the file as [`FILE`] and the memory as [`MEMORY`].
fn uring(file: BorrowedFd<'_>, memory: &MmapRegion<()>, rings: &RingStock) -> Option<IoUring> {
    let ring = rings.take()?;
    match register(&ring, file, memory) {
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

fn register(ring: &IoUring, file: BorrowedFd<'_>, memory: &MmapRegion<()>) -> io::Result<()> {
    ring.submitter().register_files(&[file.as_raw_fd()])?;
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
fn perform(
    file: BorrowedFd<'_>,
    memory: &MmapRegion<()>,
    transfer: &Transfer,
) -> io::Result<usize> {
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
        Kind::Erase { bytes, may_go } => {
            rustix::fs::fallocate(file, erasing(may_go), transfer.offset, bytes)?;
            0
        }
    })
}

#[cfg(test)]
mod tests;
