//! The socket to a back-end. Nothing here waits.

use super::message::{HEADER, MAX_PAYLOAD, Message, MessageError};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recv, recvmsg, sendmsg, shutdown,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How much of what is left in a socket is looked at, in buffers of a message: a socket's buffer has a few hundred.
const MOST_LEFT: usize = 1024;

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

#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    received: Vec<u8>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            received: Vec::new(),
        }
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
        let sent = retried(|| sendmsg(&self.socket, &[IoSlice::new(message)], &mut control, flags));
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
    pub(super) fn receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        loop {
            if let Some((message, len)) = Message::parse(&self.received)? {
                self.received.drain(..len);
                return Ok(Some(message));
            }
            let mut bytes = [0; HEADER + MAX_PAYLOAD];
            if self.has_descriptors()? {
                return Err(ConnectionError::Descriptors);
            }
            let received = retried(|| recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT));
            match received {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Ok((len, _)) => self.received.extend(&bytes[..len]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }

    /// Whether descriptors are beside what is received next.
    fn has_descriptors(&self) -> Result<bool, ConnectionError> {
        let mut byte = [0];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let received = retried(|| {
            let mut parts = [IoSliceMut::new(&mut byte)];
            // There is no room for any.
            let mut control = RecvAncillaryBuffer::default();
            recvmsg(&self.socket, &mut parts, &mut control, flags)
        });
        match received {
            Ok(received) => Ok(received.flags.contains(ReturnFlags::CTRUNC)),
            Err(Errno::AGAIN | Errno::CONNRESET) => Ok(false),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// Whether descriptors are among what is left of a connection that was shut down.
    pub(super) fn leaves_descriptors(&self) -> bool {
        let mut bytes = [0; HEADER + MAX_PAYLOAD];
        for _ in 0..MOST_LEFT {
            if self.has_descriptors().unwrap_or(true) {
                return true;
            }
            match retried(|| recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT)) {
                Ok((1.., _)) => {}
                Ok((0, _)) | Err(_) => return false,
            }
        }
        true
    }

    /// Ends it for all who have it.
    pub(super) fn shut_down(&self) {
        // An error means that the other side is gone.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
        (Connection::new(ours), theirs.into())
    }

    #[test]
    fn messages_come_in_pieces_and_together() {
        let (mut ours, mut theirs) = pair();
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
