//! Who reads what a guest writes to a port, and writes what it reads.

use super::history::History;
use super::state::Size;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread, read, write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::syscalls;

/// The most bytes of one message of a client's, with the byte before them that says what it is.
pub const MAX_MESSAGE: usize = 1 + 4096;
/// A client's message is bytes for the guest.
pub const INPUT: u8 = 0;
/// … or the size of its terminal: columns and rows, 16 bits each, little endian.
pub const RESIZE: u8 = 1;

/// In place of a position: as many are attached as can be.
pub const NO_ROOM: u64 = u64::MAX;

/// What connects a client. None of its descriptors blocks.
#[derive(Debug)]
pub enum Line {
    /// A stream of bytes, both ways.
    Stream(OwnedFd),
    /// Messages, each whole. The client's are [`INPUT`] or [`RESIZE`]. It gets bytes, and first of all the position of the first
    /// of them in all that the guest has written, 64 bits, little endian, or [`NO_ROOM`]. It has read up to `from`, if that is said.
    Messages { socket: OwnedFd, from: Option<u64> },
    /// The master of a pseudoterminal, and an inotify that tells of everyone who opens its slave.
    Pty { master: OwnedFd, opened: OwnedFd },
    /// A pipe to whoever keeps all that is written.
    Log(OwnedFd),
}

impl Line {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(fd) | Self::Log(fd) => fd.as_fd(),
            Self::Messages { socket, .. } => socket.as_fd(),
            Self::Pty { master, .. } => master.as_fd(),
        }
    }
}

/// What a client has for the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// So many bytes.
    Bytes(usize),
    Size(Size),
    /// Nothing for now.
    Nothing,
}

/// The client is there no more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// One that is attached to a port.
#[derive(Debug)]
pub(super) struct Client {
    line: Line,
    /// The next byte that it gets.
    pub(super) position: u64,
    /// It has been told its position, or needs not be.
    is_greeted: bool,
    /// Somebody is there: of a pseudoterminal, somebody has it open.
    is_present: bool,
    can_read: bool,
    can_write: bool,
}

impl Client {
    /// One that gets what `history` has, or, of a channel, what is written from now on.
    pub(super) fn new(line: Line, history: &History, is_channel: bool) -> Self {
        let kept = history.begin()..=history.end();
        let position = match &line {
            _ if is_channel => history.end(),
            Line::Log(_) => history.logged().min(history.end()),
            Line::Messages { from, .. } => match from {
                Some(from) if kept.contains(from) => *from,
                _ => history.begin(),
            },
            Line::Stream(_) | Line::Pty { .. } => history.begin(),
        };
        Self {
            is_greeted: !matches!(line, Line::Messages { .. }),
            is_present: !matches!(line, Line::Pty { .. }),
            position,
            can_read: true,
            can_write: true,
            line,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.line.fd()
    }

    /// What tells of it, beside its descriptor.
    pub(super) fn other_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.line {
            Line::Pty { opened, .. } => Some(opened.as_fd()),
            _ => None,
        }
    }

    pub(super) fn is_log(&self) -> bool {
        matches!(self.line, Line::Log(_))
    }

    /// It comes and goes.
    pub(super) fn is_visitor(&self) -> bool {
        matches!(self.line, Line::Stream(_) | Line::Messages { .. })
    }

    pub(super) fn is_present(&self) -> bool {
        self.is_present
    }

    pub(super) fn can_write(&self) -> bool {
        self.is_present && self.can_write
    }

    pub(super) fn can_read(&self) -> bool {
        self.is_present && self.can_read && !self.is_log()
    }

    /// Something has happened to it; with `has_ended`, its other end is closed.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn ready(
        &mut self,
        has_ended: bool,
        history: &History,
        is_channel: bool,
    ) -> Result<(), Gone> {
        self.can_read = true;
        self.can_write = true;
        if has_ended && !matches!(self.line, Line::Pty { .. }) {
            return Err(self.leave());
        }
        if let Line::Pty { master, opened } = &self.line {
            let mut told = [0; 512];
            while read(opened, &mut told).is_ok_and(|len| len > 0) {}
            let was_present = std::mem::replace(&mut self.is_present, is_open(master.as_fd()));
            if self.is_present && !was_present {
                self.position = match is_channel {
                    true => history.end(),
                    false => history.begin(),
                };
            }
        }
        Ok(())
    }

    fn leave(&mut self) -> Gone {
        if let Line::Log(pipe) = &self.line {
            // Whoever keeps the log next begins with what this one has not read.
            let unread = ioctl_fionread(pipe).unwrap_or(0);
            self.position = self.position.saturating_sub(unread);
        }
        Gone
    }

    /// There is no room for it.
    pub(super) fn turn_away(mut self) {
        if matches!(self.line, Line::Messages { .. }) {
            // Who does not hear it sees that the connection ends.
            let _ = self.try_write(&NO_ROOM.to_le_bytes());
        }
    }

    /// Reads what it has for the guest into `to`, which has room for a message.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn read(&mut self, to: &mut [u8]) -> Result<Input, Gone> {
        syscalls::count();
        let len = match (read(self.line.fd(), &mut *to), &self.line) {
            (Ok(0), Line::Messages { .. }) => return Err(Gone),
            // It says nothing more, and may listen: that it does not is seen when it is written to.
            (Ok(0) | Err(Errno::AGAIN), _) | (Err(_), Line::Pty { .. }) => {
                self.can_read = false;
                return Ok(Input::Nothing);
            }
            (Ok(len), _) => len,
            (Err(Errno::INTR), _) => return Ok(Input::Nothing),
            (Err(_), _) => return Err(Gone),
        };
        if !matches!(self.line, Line::Messages { .. }) {
            return Ok(Input::Bytes(len));
        }
        match to[..len] {
            [INPUT, ..] => {
                to.copy_within(1..len, 0);
                Ok(Input::Bytes(len - 1))
            }
            [RESIZE, a, b, c, d] => Ok(Input::Size(Size::from_bytes([a, b, c, d]))),
            _ => Err(Gone),
        }
    }

    /// Writes `bytes` to it, which begin at its position. How many of them it has taken.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        if !self.is_greeted {
            match self.try_write(&self.position.to_le_bytes())? {
                0 => return Ok(0),
                _ => self.is_greeted = true,
            }
        }
        let written = self.try_write(bytes)?;
        self.position += written as u64;
        Ok(written)
    }

    fn try_write(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        syscalls::count();
        match (write(self.line.fd(), bytes), &self.line) {
            (Ok(len), _) => {
                self.can_write = len > 0;
                Ok(len)
            }
            (Err(Errno::INTR), _) => Ok(0),
            (Err(Errno::AGAIN | Errno::NOMEM | Errno::NOBUFS), _) | (Err(_), Line::Pty { .. }) => {
                self.can_write = false;
                Ok(0)
            }
            (Err(_), _) => Err(self.leave()),
        }
    }
}

/// Whether anyone has the slave of `master` open.
fn is_open(master: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(master, PollFlags::IN)];
    let now = Timespec::default();
    syscalls::count();
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::HUP)
}
