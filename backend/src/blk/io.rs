//! A disk's transfers: one flush at a time stands for those that wait, and one that failed is not forgotten.

use super::disk::{Caching, Disk};
use crate::engine::{Ended, FileIo, Kind, RingStock, Transfer};
use crate::persist::StateArea;
use crate::tuning::MAX_REQUESTS;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use vm_memory::VolatileSlice;

/// The id of the flush that is in the kernel, which no request has.
const FLUSH: u16 = u16::MAX;
const _: () = assert!(MAX_REQUESTS < FLUSH);

/// Words that outlive this process. The first is not zero once a flush has failed, until the driver resets the
/// device: a later one would say that all is well.
const LOST_WRITES: usize = 0;
/// The errno of the last flush that failed, zero if none has.
const FLUSH_ERROR: usize = 1;

/// A disk and the memory that its transfers use.
pub(super) struct DiskIo {
    transfers: FileIo,
    /// What has ended without a transfer of its own.
    ended: VecDeque<Ended>,
    in_flight: usize,
    /// The flushes that one in the kernel stands for, and those that wait for the next one: Linux tells of
    /// lost pages once, so two at the same time could not both know.
    flushing: Vec<u16>,
    flush_next: Vec<u16>,
    /// `None` once the device was taken away: the words are another one's.
    kept: Option<StateArea>,
    disk: Disk,
}

impl DiskIo {
    /// As [`FileIo::new`], for `disk`, with its words in `kept`.
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
        let mut transfers = FileIo::new(disk.file().as_fd(), bytes, rings)?;
        if disk.caching() == Caching::Passing {
            transfers.keep_nothing_cached();
        }
        Ok(Self {
            transfers,
            ended: VecDeque::new(),
            in_flight: 0,
            flushing: Vec::new(),
            flush_next: Vec::new(),
            kept: Some(kept),
            disk,
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
        self.transfers.memory()
    }

    /// Transfers begun that [`DiskIo::next_ended`] has not returned.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn submissions(&self) -> u64 {
        self.transfers.submissions()
    }

    /// See [`FileIo::events`].
    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        self.transfers.events()
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
            self.transfers.begin(transfer);
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
        self.transfers.begin(Transfer {
            id: FLUSH,
            kind: Kind::Flush,
            offset: 0,
            place: 0..0,
        });
    }

    /// Ends all the flushes that one stood for, and begins the next.
    fn end_flush(&mut self, result: io::Result<usize>) {
        if let Err(error) = &result {
            self.note_lost_writes(error);
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

    /// Linux tells of lost pages once: what it says is kept before anything else is done.
    fn note_lost_writes(&self, error: &io::Error) {
        let Some(kept) = &self.kept else { return };
        if !self.has_lost_writes() {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            kept.store(FLUSH_ERROR, u64::from(errno.unsigned_abs()));
        }
        kept.store(LOST_WRITES, 1);
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

    /// See [`FileIo::submit`].
    pub(super) fn submit(&mut self) {
        self.transfers.submit(self.disk.file().as_fd());
        if self.events().is_none() {
            // It was carried out in the call.
            self.gather();
        }
    }

    fn gather(&mut self) {
        while let Some(ended) = self.transfers.next_ended() {
            match ended {
                (FLUSH, result) => self.end_flush(result),
                ended => self.ended.push_back(ended),
            }
        }
    }

    /// See [`FileIo::must_submit`].
    pub(super) fn must_submit(&self) -> bool {
        self.transfers.must_submit()
    }

    /// The next transfer that has ended, if there is one.
    pub(super) fn next_ended(&mut self) -> Option<Ended> {
        if self.ended.is_empty() {
            self.gather();
        }
        let ended = self.ended.pop_front()?;
        self.in_flight -= 1;
        Some(ended)
    }
}

impl Drop for DiskIo {
    fn drop(&mut self) {
        while let Some((id, result)) = self.transfers.next_ended() {
            if let (FLUSH, Err(error)) = (id, result) {
                self.note_lost_writes(&error);
            }
        }
    }
}

#[cfg(test)]
mod tests;
