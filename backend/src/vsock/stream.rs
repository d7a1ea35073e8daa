//! A stream of a program of the host's. What that does not take at once waits here.

use crate::engine::volatile_io;
use rustix::io::{Errno, read, write};
use rustix::net::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_guest_mapping::syscalls;

pub(super) struct Stream {
    /// Without blocking.
    fd: OwnedFd,
    backlog: VecDeque<u8>,
    can_read: bool,
    can_write: bool,
    /// dom0 had no memory for what was written: nobody tells when it has.
    lacks: bool,
    /// Nothing more is written when the backlog has gone.
    is_ending: bool,
}

/// Nobody takes what is written any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// What a look at what the program has written came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Bytes(usize),
    Nothing,
    /// There will be no more.
    End,
}

impl Stream {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            backlog: VecDeque::new(),
            can_read: true,
            can_write: true,
            lacks: false,
            is_ending: false,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Something has happened to it.
    pub(super) fn ready(&mut self) {
        self.can_read = true;
        self.can_write = true;
    }

    /// Whether there may be something to be read.
    pub(super) fn can_read(&self) -> bool {
        self.can_read
    }

    /// Whether dom0 has no memory for what waits.
    pub(super) fn lacks(&self) -> bool {
        self.lacks
    }

    /// Whether all that was written has gone.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }

    pub(super) fn read(&mut self, to: &mut VolatileSlice<'_>) -> Taken {
        let read = again(|| volatile_io::read(&mut self.fd, to));
        self.taken(read)
    }

    pub(super) fn read_byte(&mut self, to: &mut u8) -> Taken {
        syscalls::count();
        let read = again(|| Ok(read(&self.fd, std::slice::from_mut(to))?));
        self.taken(read)
    }

    fn taken(&mut self, read: io::Result<usize>) -> Taken {
        match read {
            Ok(0) => Taken::End,
            Ok(len) => Taken::Bytes(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.can_read = false;
                Taken::Nothing
            }
            Err(_) => Taken::End,
        }
    }

    /// Writes `data`, of which what has no room waits. How much of what was written before and now has gone.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn write(&mut self, data: &VolatileSlice<'_>) -> Result<usize, Gone> {
        let mut gone = self.flush()?;
        let mut rest = *data;
        if self.backlog.is_empty() {
            while !rest.is_empty() && self.can_write {
                let written = again(|| volatile_io::write(&mut self.fd, &rest));
                let written = self.written(written)?;
                rest = rest.offset(written).expect("inside");
                gone += written;
            }
        }
        let waiting = self.backlog.len();
        // No more than was promised to be held.
        self.backlog.reserve_exact(rest.len());
        self.backlog.resize(waiting + rest.len(), 0);
        let (_, place) = self.backlog.make_contiguous().split_at_mut(waiting);
        rest.read_slice(place, 0).expect("as many bytes");
        Ok(gone)
    }

    /// Writes what waits, as far as there is room. How much has gone.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn flush(&mut self) -> Result<usize, Gone> {
        let mut gone = 0;
        while !self.backlog.is_empty() && self.can_write {
            let (first, _) = self.backlog.as_slices();
            syscalls::count();
            let written = again(|| Ok(write(&self.fd, first)?));
            let written = self.written(written)?;
            self.backlog.drain(..written);
            gone += written;
        }
        if self.backlog.is_empty() {
            // A guest that is done has no more memory of ours.
            self.backlog = VecDeque::new();
            if std::mem::take(&mut self.is_ending) {
                // Whoever is gone does not hear it.
                let _ = shutdown(&self.fd, Shutdown::Write);
            }
        }
        Ok(gone)
    }

    fn written(&mut self, written: io::Result<usize>) -> Result<usize, Gone> {
        self.lacks = false;
        match written {
            Ok(len) => Ok(len),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN) => {
                    self.can_write = false;
                    Ok(0)
                }
                Some(Errno::NOMEM | Errno::NOBUFS) => {
                    self.can_write = false;
                    self.lacks = true;
                    Ok(0)
                }
                _ => Err(Gone),
            },
        }
    }

    /// Says `line` to one that was told nothing before.
    ///
    /// # Errors
    ///
    /// [`Gone`], also if it does not take it whole.
    pub(super) fn say(&mut self, line: &str) -> Result<(), Gone> {
        syscalls::count();
        match again(|| Ok(write(&self.fd, line.as_bytes())?)) {
            Ok(len) if len == line.len() => Ok(()),
            _ => Err(Gone),
        }
    }

    /// Nothing more will be written.
    pub(super) fn end(&mut self) {
        self.is_ending = true;
    }

    /// Nothing more is read: whoever writes does not wait for that.
    pub(super) fn end_reading(&self) {
        // Whoever is gone does not hear it.
        let _ = shutdown(&self.fd, Shutdown::Read);
    }

    /// What waits is for nobody.
    pub(super) fn forget(&mut self) {
        self.backlog = VecDeque::new();
        self.lacks = false;
    }
}

/// What `call` comes to when no signal comes between.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
