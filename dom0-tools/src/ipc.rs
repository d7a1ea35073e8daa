//! What supervisor and worker say to each other: one JSON message a packet, with file descriptors beside.

use crate::devices::Service;
use crate::guest_state::Backing;
use crate::toolstack::libxl::EntryKey;
use crate::worker::event_loop::EventLoopReport;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    recvmsg, sendmsg, shutdown, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use xen_virtio_transport::DeviceReport;

/// The largest message: a report of eleven devices takes about 8 KiB.
const MAX_MESSAGE: usize = 64 << 10;
/// The most descriptors that any message carries: [`ToWorker::Start`]'s.
const MAX_FDS: usize = 4;

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

impl ToWorker {
    /// Whether a worker answers it, with one message.
    pub fn is_question(&self) -> bool {
        match self {
            Self::Attach(_) | Self::Serve | Self::Detach { .. } | Self::Report => true,
            Self::Start { .. } | Self::Change { .. } | Self::Stop => false,
        }
    }
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
    /// What the next worker needs to go on with the device's back-end. Descriptor: the memory that both have. It is nobody's answer:
    /// there may be one for each connection that the worker was given.
    Shares {
        key: EntryKey,
        /// The name of the connection to that back-end.
        connection: u64,
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

/// One end of the connection between a supervisor and a worker.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Both ends of a new connection: the first does not block, the second is for the worker.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self { socket: ours }, theirs))
    }

    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Whether the other end is still there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn is_connected(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now))?;
        Ok(!fds[0].revents().contains(PollFlags::HUP))
    }

    /// Ends the connection for both.
    pub fn shut_down(&self) {
        // An error means that the other end is gone.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// # Errors
    ///
    /// `BrokenPipe` if the other end is gone, `WouldBlock` if it does not read.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "too many descriptors for a message",
            ));
        }
        for _ in 1..MEMORY_TRIES {
            let parts = [IoSlice::new(&bytes)];
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                // A message that was not sent would be taken for the end of the other side.
                Err(Errno::NOMEM | Errno::NOBUFS) => std::thread::sleep(MEMORY_WAIT),
                sent => return Ok(sent.map(drop)?),
            }
        }
        Err(Errno::NOMEM.into())
    }

    /// The next message that has arrived. `None` when there is none now.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the other end is gone, `InvalidData` for what is no message.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(
            &self.socket,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
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
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a message is too large",
            ));
        }
        let message = serde_json::from_slice(&bytes[..len])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, fds)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        assert!(theirs.receive::<ToWorker>().unwrap().is_none());
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
        let (message, fds) = theirs.receive::<ToWorker>().unwrap().unwrap();
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
    }

    #[test]
    fn what_is_no_message_is_an_error_and_so_is_the_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        ours.send(&"nonsense", &[]).unwrap();
        assert_eq!(
            theirs.receive::<ToWorker>().unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert!(theirs.is_connected().unwrap());
        drop(ours);
        assert!(!theirs.is_connected().unwrap());
        assert_eq!(
            theirs.receive::<ToWorker>().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
