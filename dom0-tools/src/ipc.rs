//! What supervisor and worker say to each other, in JSON.

use crate::devices::{Service, console};
use crate::guest_state::Backing;
use crate::toolstack::libxl::EntryKey;
use crate::worker::event_loop::EventLoopReport;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    recvmsg, sendmsg, shutdown, socketpair,
};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use xen_virtio_backend::net::MAX_PAIRS;
use xen_virtio_transport::DeviceReport;

/// The largest message: a report of eleven devices takes about 8 KiB.
const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors that any message carries: a network device's, one for each of its pairs of queues, or a console's.
const MAX_FDS: usize = if console::MAX_DESCRIPTORS > MAX_PAIRS as usize {
    console::MAX_DESCRIPTORS
} else {
    MAX_PAIRS as usize
};

/// How often a message is sent that dom0 has no memory for, and the wait between: nothing tells of memory.
const MEMORY_TRIES: u32 = 100;
const MEMORY_WAIT: Duration = Duration::from_millis(5);

#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message. Descriptors: privcmd and evtchn (non-blocking), both restricted to the guest,
    /// gntdev, and the guest's state file.
    Start {
        domid: u16,
        /// Microseconds for which the worker may look for work before it sleeps.
        poll_limit_us: u64,
        /// Percent of one processor that it may use.
        cpu_percent: u32,
    },
    /// A device for the guest. Descriptors: as its kind has it.
    Attach(Box<Attachment>),
    /// The guest finds no device at a page until one is attached there. Answered as [`ToWorker::Attach`].
    Claim {
        key: EntryKey,
        base: u64,
        len: u64,
    },
    /// The devices that the guest has had from an earlier worker have been handed over, as far as they can be:
    /// its accesses are to be answered.
    Serve,
    Detach {
        key: EntryKey,
    },
    /// A device changes while it runs, as its kind has it. Descriptors: as its kind has it.
    Change {
        key: EntryKey,
        change: Value,
    },
    /// Each request of a device is told of from now on. Descriptor: a pipe that never blocks, for its
    /// [`TraceLine`](crate::ctl::trace::TraceLine)s.
    Trace {
        key: EntryKey,
        /// It was begun with an earlier worker: whoever has begun one since is not to lose it.
        goes_on: bool,
    },
    /// Asks for [`FromWorker::Report`].
    Report,
    /// The guest is gone: give everything back and end.
    Stop,
}

/// What a worker is told of a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    pub key: EntryKey,
    /// A virtio device type number.
    pub device_type: u32,
    pub service: Service,
    pub base: u64,
    pub len: u64,
    pub irq: u32,
    pub grant_usage: bool,
    /// The guest has had it from an earlier worker.
    pub served: bool,
    /// What its contents are in.
    pub backing: Option<Backing>,
    /// Bytes of the guest's state file, which may have grown.
    pub state_bytes: usize,
    /// What its kind has to say.
    pub spec: Value,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromWorker {
    /// The worker cannot serve the guest, and ends.
    Failed {
        error: String,
    },
    Attached {
        key: EntryKey,
        /// What it is known to be now, for its guest's next life.
        known: Option<Value>,
    },
    AttachFailed {
        key: EntryKey,
        error: String,
        /// Somebody else has what it needs, who may let go of it soon.
        busy: bool,
    },
    /// The back-end has the memory that came with the connection: the next worker is to go on with both. It is nobody's answer:
    /// there may be one for each connection that the worker was given.
    Shares {
        key: EntryKey,
        /// The name of the connection to that back-end.
        connection: u64,
    },
    /// The guest wants a connection to the program of dom0's that has a port, which [`ToWorker::Change`] answers. It is nobody's
    /// answer, and there are no more than [`Dial::MOST`](xen_virtio_backend::vsock::Dial::MOST) for a device that were not answered.
    Dials {
        key: EntryKey,
        /// What the answer names.
        number: u64,
        port: u32,
    },
    /// The guest is served from now on, whether the supervisor lives or not.
    Serving,
    Detached {
        key: EntryKey,
    },
    Report {
        server: EventLoopReport,
        devices: Vec<(EntryKey, DeviceReport)>,
    },
}

/// Bytes of answers that may wait for the supervisor, as the kernel keeps them.
const ANSWERS_SIZE: usize = 256 << 10;
/// … and that it reads at once.
const ANSWERS_READ: usize = 16 << 10;

/// The supervisor's end of the connection with a worker.
///
/// Commands go down a socket, with descriptors beside. Answers, a line each, come up a pipe, which carries no descriptors: to close
/// some that a worker sends can take as long as whoever has made them likes.
#[derive(Debug)]
pub struct SupervisorEnd {
    commands: OwnedFd,
    answers: OwnedFd,
    received: Vec<u8>,
    /// Bytes of that in which no line ends.
    scanned: usize,
}

/// What a worker has of the connection.
#[derive(Debug)]
pub struct WorkerEnds {
    pub commands: OwnedFd,
    pub answers: OwnedFd,
}

/// The worker's end of the connection.
#[derive(Debug)]
pub struct WorkerEnd {
    commands: OwnedFd,
    /// Until it ends the connection.
    answers: RefCell<Option<OwnedFd>>,
}

impl SupervisorEnd {
    /// Both ends of a new connection, of which none blocks.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn pair() -> io::Result<(Self, WorkerEnds)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // What the worker would send here nobody reads, and somebody had to close.
        shutdown(&ours, Shutdown::Read)?;
        let (answers, their_answers) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&answers, ANSWERS_SIZE)?;
        let this = Self {
            commands: ours,
            answers,
            received: Vec::new(),
            scanned: 0,
        };
        let ends = WorkerEnds {
            commands: theirs,
            answers: their_answers,
        };
        Ok((this, ends))
    }

    /// # Errors
    ///
    /// `BrokenPipe` if the worker is gone, `WouldBlock` if it does not read.
    pub fn send(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(&self.commands, message, fds)
    }

    /// The next answer that has arrived. `None` when there is none now.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the worker is gone, `InvalidData` for what is no message.
    pub fn receive(&mut self) -> io::Result<Option<FromWorker>> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        loop {
            let mut rest = self.received[self.scanned..].iter();
            if let Some(end) = rest.position(|byte| *byte == b'\n') {
                let end = self.scanned + end;
                self.scanned = 0;
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| invalid(error.to_string()));
            }
            self.scanned = self.received.len();
            if self.scanned > MAX_MESSAGE {
                return Err(invalid("a message is too large".to_owned()));
            }
            let mut bytes = [0; ANSWERS_READ];
            match read(&self.answers, &mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.received.extend(&bytes[..len]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for SupervisorEnd {
    /// Readable when there are answers, or the worker is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.answers.as_fd()
    }
}

impl WorkerEnd {
    pub fn new(ends: WorkerEnds) -> Self {
        Self {
            commands: ends.commands,
            answers: RefCell::new(Some(ends.answers)),
        }
    }

    /// Whether the supervisor is still there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn is_connected(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.commands, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now))?;
        Ok(!fds[0].revents().contains(PollFlags::HUP))
    }

    /// Ends the connection for both.
    pub fn shut_down(&self) {
        self.answers.replace(None);
        // An error means that the other end is gone.
        let _ = shutdown(&self.commands, Shutdown::Both);
    }

    /// # Errors
    ///
    /// `BrokenPipe` if the supervisor is gone, `WouldBlock` if it does not read; the connection is of no use then.
    pub fn send(&self, message: &FromWorker) -> io::Result<()> {
        let answers = self.answers.borrow();
        let answers = answers.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
        line.push(b'\n');
        let mut rest = &line[..];
        while !rest.is_empty() {
            // All of it, unless there is no room, or dom0 has no memory for more at once.
            let written = with_memory(|| write(answers, rest))?;
            rest = &rest[written..];
        }
        Ok(())
    }

    /// The next command that has arrived. `None` when there is none now.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the supervisor is gone, `InvalidData` for what is no message.
    pub fn receive(&self) -> io::Result<Option<(ToWorker, Vec<OwnedFd>)>> {
        receive(&self.commands)
    }
}

impl AsFd for WorkerEnd {
    /// Readable when there are commands, or the supervisor is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.commands.as_fd()
    }
}

/// Sends `message` as one packet, with descriptors beside.
///
/// # Errors
///
/// The system's, and `InvalidInput` for too many descriptors.
pub(crate) fn send(
    socket: &OwnedFd,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors for a message",
        ));
    }
    with_memory(|| {
        let parts = [IoSlice::new(&bytes)];
        sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// The next packet, with its descriptors. `None` when there is none now.
///
/// # Errors
///
/// `UnexpectedEof` when the other end is gone, `InvalidData` for what is no message.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = match recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let len = received.bytes;
    if len == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    if received.flags.intersects(cut) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message is too large",
        ));
    }
    let message = serde_json::from_slice(&bytes[..len])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fds)))
}

/// Makes `call` until dom0 has the memory for it, or it looks as if it never had: a message that was not sent would be taken for
/// the end of the other side.
fn with_memory<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 1..MEMORY_TRIES {
        match call() {
            Err(Errno::NOMEM | Errno::NOBUFS) => std::thread::sleep(MEMORY_WAIT),
            made => return made,
        }
    }
    Err(Errno::NOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixDatagram;

    fn pair() -> (SupervisorEnd, WorkerEnd) {
        let (ours, theirs) = SupervisorEnd::pair().unwrap();
        (ours, WorkerEnd::new(theirs))
    }

    #[test]
    fn as_many_descriptors_arrive_as_a_device_may_have() {
        let (ours, theirs) = pair();
        let file = File::open("/dev/null").unwrap();
        let fds = [file.as_fd(); MAX_FDS];
        for count in 0..=MAX_FDS {
            ours.send(&ToWorker::Report, &fds[..count]).unwrap();
            let (_, arrived) = theirs.receive().unwrap().unwrap();
            assert_eq!(arrived.len(), count);
        }
    }

    #[test]
    fn a_command_arrives_whole_with_its_descriptors() {
        let (ours, theirs) = pair();
        assert!(theirs.receive().unwrap().is_none());
        let file = File::open("/dev/null").unwrap();
        ours.send(
            &ToWorker::Start {
                domid: 3,
                poll_limit_us: 9,
                cpu_percent: 50,
            },
            &[file.as_fd(), file.as_fd(), file.as_fd(), file.as_fd()],
        )
        .unwrap();
        ours.send(&ToWorker::Report, &[]).unwrap();
        let (message, fds) = theirs.receive().unwrap().unwrap();
        assert!(matches!(
            message,
            ToWorker::Start {
                domid: 3,
                poll_limit_us: 9,
                cpu_percent: 50,
            }
        ));
        assert_eq!(fds.len(), 4);
        assert!(
            matches!(theirs.receive().unwrap(), Some((ToWorker::Report, fds)) if fds.is_empty())
        );
        assert!(theirs.is_connected().unwrap());
        drop(ours);
        assert!(!theirs.is_connected().unwrap());
        let error = theirs.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    /// What no worker of ours writes.
    fn write_raw(end: &WorkerEnd, bytes: &[u8]) -> rustix::io::Result<usize> {
        let answers = end.answers.borrow();
        write(answers.as_ref().unwrap(), bytes)
    }

    #[test]
    fn answers_arrive_in_pieces_and_together() {
        let (mut ours, theirs) = pair();
        assert!(ours.receive().unwrap().is_none());
        let text = "two\nlines".repeat(3000);
        let long = FromWorker::Failed {
            error: text.clone(),
        };
        theirs.send(&FromWorker::Serving).unwrap();
        theirs.send(&long).unwrap();
        write_raw(&theirs, b"\"Ser").unwrap();
        assert!(matches!(ours.receive(), Ok(Some(FromWorker::Serving))));
        let failed = ours.receive().unwrap();
        assert!(matches!(failed, Some(FromWorker::Failed { error }) if error == text));
        assert!(ours.receive().unwrap().is_none());
        write_raw(&theirs, b"ving\"\nnonsense\n").unwrap();
        assert!(matches!(ours.receive(), Ok(Some(FromWorker::Serving))));
        let error = ours.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(theirs);
        let error = ours.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_worker_fills_no_more_than_there_is_room_for() {
        let (mut ours, theirs) = pair();
        let mut sent = 0;
        while theirs.send(&FromWorker::Serving).is_ok() {
            sent += 1;
            assert!(sent < ANSWERS_SIZE);
        }
        for _ in 0..sent {
            assert!(matches!(ours.receive(), Ok(Some(FromWorker::Serving))));
        }
        while ours.receive().is_ok_and(|answer| answer.is_some()) {}
        // A line without an end.
        while let Ok(1..) = write_raw(&theirs, &[b' '; 4096]) {}
        let error = ours.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(ours.received.len() <= MAX_MESSAGE + ANSWERS_READ);
    }

    /// Nobody would read it, and to close what is beside could take long.
    #[test]
    fn a_worker_sends_nothing_by_the_socket() {
        let (ours, theirs) = pair();
        let socket = UnixDatagram::from(theirs.commands.try_clone().unwrap());
        assert!(socket.send(b"x").is_err());
        ours.send(&ToWorker::Report, &[]).unwrap();
        assert!(theirs.receive().unwrap().is_some());
    }
}
