//! The socket to a back-end. Nothing here waits.

use super::message::{HEADER, MAX_PAYLOAD, Message, MessageError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recv, recvmsg, sendmsg, shutdown, sockopt,
};
use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How much of what is left in a socket is looked at, in buffers of a message: a socket's buffer has a few hundred.
const MOST_LEFT: usize = 1024;

/// How many sockets a process leaves open, which is a few of its descriptors.
const MOST_LEFT_OPEN: usize = 32;

thread_local! {
    static LEFT_OPEN: Cell<usize> = const { Cell::new(0) };
}

/// How many sockets this process, which has one thread for that, has left open.
fn left_open() -> usize {
    LEFT_OPEN.get()
}

/// Whether a socket is to be had that a back-end, and nobody else, has the other end of: it may have to be left open, and the others
/// that there are too.
pub(super) fn may_be_left_open() -> bool {
    left_open() < MOST_LEFT_OPEN / 2
}

/// Why nothing more is to be had from a back-end.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("it has closed the connection")]
    Closed,
    #[error("it does not read its messages")]
    Full,
    #[error("it sends descriptors, which nobody has asked for")]
    Descriptors,
    #[error("the connection to it has failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// Nothing of a message is taken out of the socket before all of it is there: another process finds the socket as a message
/// has left it.
#[derive(Debug)]
pub(super) struct Connection {
    /// Until it has ended.
    socket: Option<OwnedFd>,
}

/// What is next in a socket, which stays there.
enum Next {
    /// Bytes; none if the other side has closed it and there is nothing left.
    Bytes(usize),
    /// Bytes with descriptors beside.
    Descriptors,
    Nothing,
}

impl Connection {
    /// # Errors
    ///
    /// The system's.
    pub(super) fn new(socket: OwnedFd) -> Result<Self, ConnectionError> {
        // What is out of band is not looked at with what is next, and could have descriptors beside all the same.
        sockopt::set_socket_oobinline(&socket, true).map_err(io::Error::from)?;
        Ok(Self {
            socket: Some(socket),
        })
    }

    fn socket(&self) -> &OwnedFd {
        self.socket.as_ref().expect("it has not ended")
    }

    /// Sends a message, with at most one descriptor.
    ///
    /// # Errors
    ///
    /// [`ConnectionError`]: the connection is of no use any more.
    pub(super) fn send(
        &self,
        message: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptor = descriptor.as_slice();
        if !descriptor.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptor));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent =
            retried(|| sendmsg(self.socket(), &[IoSlice::new(message)], &mut control, flags));
        match sent {
            Ok(len) if len == message.len() => Ok(()),
            // What is under way at once has room in any socket's buffer.
            Ok(_) | Err(Errno::AGAIN) => Err(ConnectionError::Full),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(ConnectionError::Closed),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// The next message, if one has arrived. One with descriptors beside it is left where it is: to close what they are of can
    /// take as long as whoever sent them likes.
    ///
    /// # Errors
    ///
    /// As [`Connection::send`].
    pub(super) fn receive(&self) -> Result<Option<Message>, ConnectionError> {
        let mut bytes = [0; HEADER + MAX_PAYLOAD];
        let len = match peek(self.socket(), &mut bytes)? {
            Next::Nothing => return Ok(None),
            Next::Descriptors => return Err(ConnectionError::Descriptors),
            Next::Bytes(0) => return Err(ConnectionError::Closed),
            Next::Bytes(len) => len,
        };
        match Message::parse(&bytes[..len])? {
            Some((message, len)) => {
                take(self.socket(), &mut bytes[..len])?;
                Ok(Some(message))
            }
            None if self.is_closed()? => Err(ConnectionError::Closed),
            // The rest is on its way.
            None => Ok(None),
        }
    }

    /// Whether the other side sends nothing more.
    fn is_closed(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.socket(), PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        retried(|| poll(&mut fds, Some(&now)))?;
        Ok(!fds[0].revents().is_empty())
    }

    /// Ends it for all who have it. Its socket is left open if there are descriptors in it: to close what they are of can take as
    /// long as whoever sent them likes. Of more than [`MOST_LEFT_OPEN`] a supervisor is to have another descriptor.
    pub(super) fn end(&mut self) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        // An error means that the other side is gone.
        let _ = shutdown(&socket, Shutdown::Both);
        if left_open() < MOST_LEFT_OPEN && has_descriptors(&socket) {
            LEFT_OPEN.set(left_open() + 1);
            std::mem::forget(socket);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

fn peek(socket: &OwnedFd, bytes: &mut [u8]) -> io::Result<Next> {
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let received = retried(|| {
        let mut parts = [IoSliceMut::new(bytes)];
        // There is no room for any.
        let mut control = RecvAncillaryBuffer::default();
        recvmsg(socket, &mut parts, &mut control, flags)
    });
    match received {
        Ok(received) if received.flags.contains(ReturnFlags::CTRUNC) => Ok(Next::Descriptors),
        Ok(received) => Ok(Next::Bytes(received.bytes)),
        Err(Errno::AGAIN) => Ok(Next::Nothing),
        Err(Errno::CONNRESET) => Ok(Next::Bytes(0)),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes what was next, and no byte more: descriptors may have come beside that.
fn take(socket: &OwnedFd, bytes: &mut [u8]) -> io::Result<()> {
    retried(|| recv(socket, &mut *bytes, RecvFlags::DONTWAIT))?;
    Ok(())
}

/// Whether descriptors are among what is left in a socket that was shut down.
fn has_descriptors(socket: &OwnedFd) -> bool {
    let mut bytes = [0; HEADER + MAX_PAYLOAD];
    for _ in 0..MOST_LEFT {
        match peek(socket, &mut bytes) {
            Ok(Next::Nothing | Next::Bytes(0)) => return false,
            Ok(Next::Bytes(len)) if take(socket, &mut bytes[..len]).is_ok() => {}
            Ok(_) | Err(_) => return true,
        }
    }
    true
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Request, message, number};
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Connection, UnixStream) {
        let flags = SocketFlags::empty();
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (Connection::new(ours).unwrap(), theirs.into())
    }

    #[test]
    fn messages_come_in_pieces_and_together() {
        let (ours, mut theirs) = pair();
        assert!(ours.receive().unwrap().is_none());
        let two = [
            message(Request::GetFeatures, false, &number(7)),
            message(Request::GetQueueNum, false, &number(8)),
        ];
        let bytes = two.concat();
        theirs.write_all(&bytes[..13]).unwrap();
        assert!(ours.receive().unwrap().is_none());
        theirs.write_all(&bytes[13..]).unwrap();
        for expected in [7, 8] {
            assert_eq!(ours.receive().unwrap().unwrap().number(), Some(expected));
        }
        assert!(ours.receive().unwrap().is_none());
        drop(theirs);
        assert!(matches!(ours.receive(), Err(ConnectionError::Closed)));
        let sent = ours.send(&bytes, None);
        assert!(matches!(sent, Err(ConnectionError::Closed)));
    }

    fn is_left_open(ours: &mut Connection) -> bool {
        let before = left_open();
        ours.end();
        left_open() > before
    }

    /// Sends `bytes` with a descriptor beside.
    fn send_file(theirs: &UnixStream, bytes: &[u8], flags: SendFlags) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [theirs.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(theirs, &[IoSlice::new(bytes)], &mut control, flags).unwrap();
    }

    #[test]
    fn descriptors_stay_where_they_are() {
        let two = [7, 8].map(|number_of| message(Request::GetFeatures, false, &number(number_of)));
        // Behind a message, out of band before one, and beside one.
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&two[0]).unwrap();
        send_file(&theirs, &two[1], SendFlags::empty());
        let first = ours.receive();
        assert!(
            matches!(first, Err(ConnectionError::Descriptors))
                || first.unwrap().unwrap().number() == Some(7)
        );
        assert!(is_left_open(&mut ours));
        let (mut ours, mut theirs) = pair();
        send_file(&theirs, &[0], SendFlags::OOB);
        theirs.write_all(&two[0]).unwrap();
        let received = ours.receive();
        assert!(matches!(received, Err(ConnectionError::Descriptors)));
        assert!(is_left_open(&mut ours));
    }

    /// What is taken is what was looked at, though descriptors have come meanwhile.
    #[test]
    fn what_came_behind_a_message_is_not_taken_with_it() {
        let (ours, mut theirs) = pair();
        let bytes = message(Request::GetFeatures, false, &number(7));
        theirs.write_all(&bytes).unwrap();
        let mut space = [0; HEADER + MAX_PAYLOAD];
        let Ok(Next::Bytes(len)) = peek(ours.socket(), &mut space) else {
            panic!("nothing came");
        };
        send_file(&theirs, &bytes, SendFlags::empty());
        take(ours.socket(), &mut space[..len]).unwrap();
        assert!(matches!(
            peek(ours.socket(), &mut space),
            Ok(Next::Descriptors)
        ));
    }

    #[test]
    fn a_message_of_which_a_part_has_come_is_there_for_another_process() {
        let (ours, mut theirs) = pair();
        let bytes = message(Request::GetFeatures, false, &number(7));
        theirs.write_all(&bytes[..15]).unwrap();
        assert!(ours.receive().unwrap().is_none());
        let next = Connection::new(ours.as_fd().try_clone_to_owned().unwrap()).unwrap();
        // As a process ends that is killed.
        std::mem::forget(ours);
        theirs.write_all(&bytes[15..]).unwrap();
        assert_eq!(next.receive().unwrap().unwrap().number(), Some(7));
        theirs.write_all(&bytes[..15]).unwrap();
        drop(theirs);
        assert!(matches!(next.receive(), Err(ConnectionError::Closed)));
    }

    /// A back-end that reads nothing holds nobody up.
    #[test]
    fn a_full_socket_ends_the_connection() {
        let (ours, mut theirs) = pair();
        let message = message(Request::SetOwner, false, &[0; MAX_PAYLOAD]);
        let mut sent = 0;
        let error = loop {
            match ours.send(&message, None) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 10_000);
        };
        assert!(matches!(error, ConnectionError::Full));
        // What was sent in one start is far less than the first that did not go.
        assert!(sent > 50, "{sent}");
        let mut first = vec![0; message.len()];
        theirs.read_exact(&mut first).unwrap();
        assert_eq!(first, message);
    }
}
