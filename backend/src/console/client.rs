//! Who reads what a guest writes to a port, and writes what it reads.

use super::history::{History, Reader};
use super::state::Size;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg,
    shutdown,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::{PAGE_SIZE, syscalls};

/// The most bytes of one message of a client's, with the byte before them that says what it is.
pub const MAX_MESSAGE: usize = 1 + PAGE_SIZE;
/// A client's message is bytes for the guest.
pub const INPUT: u8 = 0;
/// … or the size of its terminal: columns and rows, 16 bits each, little endian.
pub const RESIZE: u8 = 1;
/// In place of a position: as many are attached as can be.
pub const NO_ROOM: u64 = u64::MAX;

/// What connects a client.
#[derive(Debug)]
pub enum Line {
    /// A stream of bytes, both ways.
    Stream(OwnedFd),
    /// Messages, each whole. The client's are [`INPUT`] or [`RESIZE`]. It gets bytes, and first of all the position of the first
    /// of them in all that the guest has written, 64 bits, little endian, or [`NO_ROOM`]. It has read up to `from`, if that is
    /// said. The connection ends where it would miss something, so that it never has another position than it believes.
    Messages { socket: OwnedFd, from: Option<u64> },
    /// The master of a pseudoterminal, and an inotify that tells of everyone who opens its slave. Neither blocks.
    Pty { master: OwnedFd, opened: OwnedFd },
    /// A pipe to whoever keeps all that is written, which does not block.
    Log(OwnedFd),
}

impl Line {
    /// It comes and goes.
    pub(super) fn is_visitors(&self) -> bool {
        matches!(self, Self::Stream(_) | Self::Messages { .. })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(fd) | Self::Log(fd) => fd.as_fd(),
            Self::Messages { socket, .. } => socket.as_fd(),
            Self::Pty { master, .. } => master.as_fd(),
        }
    }

    /// Who goes on here where another process has left it.
    fn reader(&self) -> Option<Reader> {
        match self {
            Self::Log(_) => Some(Reader::Log),
            Self::Pty { .. } => Some(Reader::Pty),
            Self::Stream(_) | Self::Messages { .. } => None,
        }
    }

    fn read(&self, to: &mut [u8]) -> Result<usize, Errno> {
        syscalls::count();
        if !self.is_visitors() {
            return read(self.fd(), to);
        }
        match self.receive(to) {
            // Linux says once that the other end has closed with something unread, and may say so before what that has sent.
            Err(Errno::CONNRESET) => self.receive(to),
            received => received,
        }
    }

    fn receive(&self, to: &mut [u8]) -> Result<usize, Errno> {
        // Whoever has the other end may have it block. Descriptors that come beside are nobody's.
        let mut parts = [IoSliceMut::new(to)];
        let mut beside = RecvAncillaryBuffer::default();
        let received = recvmsg(self.fd(), &mut parts, &mut beside, RecvFlags::DONTWAIT)?;
        Ok(received.bytes)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        syscalls::count();
        if !self.is_visitors() {
            return write(self.fd(), bytes);
        }
        let parts = [IoSlice::new(bytes)];
        let mut beside = SendAncillaryBuffer::default();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(self.fd(), &parts, &mut beside, flags)
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

/// What became of bytes for a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// It has so many of them.
    Taken(usize),
    /// It has room for no more, and tells when it has.
    Full,
    /// dom0 has no memory for more, of which nothing tells.
    Lacking,
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
    /// Its other end is closed: what it has said is read still.
    has_ended: bool,
    /// It takes nothing any more, and may have more to say.
    is_deaf: bool,
    can_read: bool,
    can_write: bool,
}

impl Client {
    /// One that gets what `history` has, or, of a channel, what is written from now on; who was here before goes on.
    pub(super) fn new(line: Line, history: &History, is_channel: bool) -> Self {
        let kept = history.begin()..=history.end();
        let before = match &line {
            Line::Log(_) => Some(history.reader(Reader::Log).unwrap_or(history.begin())),
            Line::Messages { from, .. } => from.filter(|from| kept.contains(from)),
            Line::Pty { .. } => history.reader(Reader::Pty),
            Line::Stream(_) => None,
        };
        let is_present = match &line {
            Line::Pty { .. } => before.is_some(),
            _ => true,
        };
        Self {
            position: before.unwrap_or_else(|| begin(history, is_channel)),
            is_greeted: !matches!(line, Line::Messages { .. }),
            is_present,
            has_ended: false,
            is_deaf: false,
            can_read: true,
            can_write: true,
            line,
        }
    }

    /// What tells of it.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let opened = match &self.line {
            Line::Pty { opened, .. } => Some(opened.as_fd()),
            _ => None,
        };
        std::iter::once(self.line.fd()).chain(opened)
    }

    pub(super) fn is_log(&self) -> bool {
        matches!(self.line, Line::Log(_))
    }

    /// It is to be told its position in all that was written.
    pub(super) fn counts(&self) -> bool {
        matches!(self.line, Line::Messages { .. })
    }

    pub(super) fn is_visitor(&self) -> bool {
        self.line.is_visitors()
    }

    /// Somebody is there who reads, or who has said something.
    pub(super) fn is_present(&self) -> bool {
        self.is_present
    }

    pub(super) fn listens(&self) -> bool {
        self.is_present && !self.has_ended && !self.is_deaf
    }

    /// Its other end is closed.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// It gets nothing more, which it sees. What it says is read still.
    pub(super) fn end_writing(&mut self) {
        self.is_deaf = true;
        // Whoever is gone does not see it.
        let _ = shutdown(self.line.fd(), Shutdown::Write);
    }

    pub(super) fn can_write(&self) -> bool {
        self.listens() && self.can_write
    }

    /// It has not been told where it begins.
    pub(super) fn is_greeted(&self) -> bool {
        self.is_greeted
    }

    pub(super) fn can_read(&self) -> bool {
        self.can_read && !self.is_log()
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
        match &self.line {
            Line::Log(_) if has_ended => return Err(self.leave()),
            Line::Log(_) => {}
            Line::Stream(_) | Line::Messages { .. } => self.has_ended |= has_ended,
            Line::Pty { master, opened } => {
                let mut told = [0; 512];
                while read(opened, &mut told).is_ok_and(|len| len > 0) {}
                let was_present = std::mem::replace(&mut self.is_present, is_open(master.as_fd()));
                if self.is_present && !was_present {
                    self.position = begin(history, is_channel);
                }
                self.note(history);
            }
        }
        Ok(())
    }

    /// Notes where it is, for the next process.
    pub(super) fn note(&self, history: &History) {
        if let Some(reader) = self.line.reader() {
            let position = self.is_present.then_some(self.position);
            history.note_reader(reader, position);
        }
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
    pub(super) fn turn_away(self) {
        if self.counts() {
            // Who does not hear it sees that the connection ends.
            let _ = self.line.write(&NO_ROOM.to_le_bytes());
        }
    }

    /// Reads what it has for the guest into `to`, which has room for a message.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn read(&mut self, to: &mut [u8]) -> Result<Input, Gone> {
        // As much as a page has, which the guest's buffers are.
        let most = if self.counts() {
            MAX_MESSAGE
        } else {
            PAGE_SIZE
        };
        let len = match (self.line.read(&mut to[..most]), &self.line) {
            (Ok(0), Line::Messages { .. }) => return Err(Gone),
            (Ok(0), Line::Stream(_)) if self.is_deaf => return Err(Gone),
            (Ok(0) | Err(Errno::AGAIN), Line::Stream(_) | Line::Messages { .. })
                if self.has_ended =>
            {
                return Err(Gone);
            }
            // It says nothing more, and may listen still.
            (Ok(0) | Err(Errno::AGAIN), _) | (Err(_), Line::Pty { .. }) => {
                self.can_read = false;
                return Ok(Input::Nothing);
            }
            (Ok(len), _) => len,
            (Err(Errno::INTR), _) => return Ok(Input::Nothing),
            (Err(_), _) => return Err(Gone),
        };
        if !self.counts() {
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

    /// Tells it where it begins.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn greet(&mut self) -> Result<Output, Gone> {
        let output = self.try_write(&self.position.to_le_bytes())?;
        self.is_greeted = matches!(output, Output::Taken(_));
        Ok(output)
    }

    /// Writes `bytes` to it, which begin at its position.
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<Output, Gone> {
        let output = self.try_write(bytes)?;
        if let Output::Taken(written) = output {
            self.position += written as u64;
        }
        Ok(output)
    }

    fn try_write(&mut self, bytes: &[u8]) -> Result<Output, Gone> {
        match (self.line.write(bytes), &self.line) {
            (Ok(len @ 1..), _) => Ok(Output::Taken(len)),
            (Err(Errno::INTR), _) => Ok(Output::Taken(0)),
            (Err(Errno::NOMEM | Errno::NOBUFS), _) => Ok(Output::Lacking),
            (Ok(0) | Err(Errno::AGAIN), _) | (Err(_), Line::Pty { .. }) => {
                self.can_write = false;
                Ok(Output::Full)
            }
            // What it has said before it went is read first.
            (Err(Errno::PIPE | Errno::CONNRESET), Line::Stream(_) | Line::Messages { .. }) => {
                self.is_deaf = true;
                self.can_read = true;
                Ok(Output::Full)
            }
            (Err(_), _) => Err(self.leave()),
        }
    }
}

/// Where one begins that comes now.
fn begin(history: &History, is_channel: bool) -> u64 {
    match is_channel {
        true => history.end(),
        false => history.begin(),
    }
}

/// Whether anyone has the slave of `master` open.
fn is_open(master: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(master, PollFlags::IN)];
    let now = Timespec::default();
    syscalls::count();
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::history::Mark;
    use crate::persist::StateArea;
    use rustix::fs::inotify::{self, WatchFlags};
    use rustix::fs::{Mode, OFlags, open};
    use rustix::io::ioctl_fionbio;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

    fn open_slave(name: &std::ffi::CStr) -> OwnedFd {
        let slave = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let mut attributes = tcgetattr(&slave).unwrap();
        attributes.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &attributes).unwrap();
        slave
    }

    fn shown(slave: &OwnedFd, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let len = read(slave, &mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// Somebody has a pseudoterminal open while processes come and go.
    #[test]
    fn a_pseudoterminal_goes_on_where_it_was_and_begins_with_all_for_who_comes() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        ioctl_fionbio(&master, true).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        drop(open_slave(&name));
        let opened = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&opened, &name, WatchFlags::OPEN).unwrap();
        let area = StateArea::private(History::BYTES).unwrap();
        let history = History::new(area);
        let process = || {
            let (master, opened) = (master.try_clone().unwrap(), opened.try_clone().unwrap());
            let mut client = Client::new(Line::Pty { master, opened }, &history, false);
            client.ready(false, &history, false).unwrap();
            client
        };
        let write = |client: &mut Client| {
            let mut bytes = [0; 64];
            let there = history.read(client.position, &mut bytes);
            let written = client.write(there).unwrap();
            client.note(&history);
            written
        };
        history.append(b"first", Mark::NONE);
        assert!(!process().can_write());
        let slave = open_slave(&name);
        let mut client = process();
        assert_eq!(write(&mut client), Output::Taken(5));
        assert_eq!(shown(&slave, 64), b"first");
        drop(client);
        history.append(b"second", Mark::NONE);
        let mut client = process();
        assert_eq!(write(&mut client), Output::Taken(6));
        assert_eq!(shown(&slave, 64), b"second");
        drop(slave);
        client.ready(true, &history, false).unwrap();
        assert!(!client.can_write());
        drop(client);
        let slave = open_slave(&name);
        let mut client = process();
        assert_eq!(write(&mut client), Output::Taken(11));
        assert_eq!(shown(&slave, 64), b"firstsecond");
    }
}
