//! Connections to back-ends, which the supervisor makes and closes.
//!
//! A back-end can send descriptors beside what it says, which nobody takes: they are closed with the last descriptor of the
//! connection. To close some takes as long as whoever made them likes: a file of a user's file system, a TCP socket that lingers.

use anyhow::{Context, Result};
use rustix::fs::{FileType, Mode, OFlags, fchmod, fstat, open};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with,
};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a connection is kept for its worker to close it first.
const CLOSING: Duration = Duration::from_secs(2);

/// Connections that wait for us, at most.
const BACKLOG: i32 = 128;

/// How many of a socket's connections may be being closed, each by a thread, before no other one is made.
const MOST_CLOSING: usize = 16;

/// How many connections are being closed, by socket.
static CLOSINGS: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

fn closings() -> MutexGuard<'static, BTreeMap<PathBuf, usize>> {
    CLOSINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects to the back-end at `path`, without waiting for it. Whoever owns the socket's folder does not choose another socket
/// for it by a link: it is root that connects.
///
/// # Errors
///
/// The system's, and that too many of its connections are not closed.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    if closings()
        .get(path)
        .is_some_and(|count| *count >= MOST_CLOSING)
    {
        return Err(io::Error::other(format!(
            "{MOST_CLOSING} connections to it are not closed yet: does it send descriptors that take long to close? It is connected \
             to again when they are"
        )));
    }
    let place = open(
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if FileType::from_raw_mode(fstat(&place)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is no socket"));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let place = format!("/proc/self/fd/{}", place.as_raw_fd());
    connect(&socket, &SocketAddrUnix::new(place)?)?;
    Ok(socket)
}

/// A socket at `path` that those may connect to whom `mode` lets write, in place of one that an earlier process has left there.
///
/// # Errors
///
/// The system's, also if somebody listens there.
pub(crate) fn listen(path: &Path, mode: Mode) -> Result<UnixListener> {
    let is_refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if connect_to(path).is_err_and(|error| is_refused(&error)) {
        fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // What the socket has, its place has from the beginning.
    fchmod(&socket, mode)?;
    let address = SocketAddrUnix::new(path)?;
    let bound = bind(&socket, &address).and_then(|()| rustix::net::listen(&socket, BACKLOG));
    bound.with_context(|| format!("listening at {}", path.display()))?;
    Ok(UnixListener::from(socket))
}

/// Closes `files`, among which may be the last descriptor of a connection to the back-end at `path`, where nobody waits for it.
/// Where there is no thread for that, they stay open.
pub(crate) fn close_later(path: &Path, files: Vec<OwnedFd>) {
    if files.is_empty() {
        return;
    }
    let path = path.to_owned();
    let files = ManuallyDrop::new(files);
    let closing = std::thread::Builder::new().name("closing".to_owned());
    let _ = closing.spawn(move || {
        std::thread::sleep(CLOSING);
        *closings().entry(path.clone()).or_default() += 1;
        drop(ManuallyDrop::into_inner(files));
        let mut closings = closings();
        if let Some(count) = closings.get_mut(&path) {
            *count -= 1;
        }
        closings.retain(|_, count| *count > 0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    /// A socket that takes as long to be closed: it lingers for its data, which nobody reads.
    fn lingers(linger: Duration) -> (TcpListener, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        while (&stream).write(&[0; 65536]).is_ok() {}
        sockopt::set_socket_linger(&stream, Some(linger)).unwrap();
        (listener, stream)
    }

    #[test]
    fn what_takes_long_to_close_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let back_end = UnixListener::bind(&path).unwrap();
        let begun = Instant::now();
        let mut listeners = Vec::new();
        for _ in 0..MOST_CLOSING {
            let socket = connect_to(&path).unwrap();
            let (theirs, _) = back_end.accept().unwrap();
            let (listener, stream) = lingers(Duration::from_secs(60));
            listeners.push(listener);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [stream.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            let parts = [IoSlice::new(b"x")];
            sendmsg(&theirs, &parts, &mut control, SendFlags::empty()).unwrap();
            close_later(&path, vec![socket]);
        }
        assert!(begun.elapsed() < CLOSING);
        assert!(connect_to(&path).is_ok());
        std::thread::sleep(CLOSING + Duration::from_millis(500));
        let error = connect_to(&path).unwrap_err().to_string();
        assert!(error.contains("not closed"), "{error}");
        // Others are none the worse for it.
        let other = folder.path().join("other");
        let _other_back_end = UnixListener::bind(&other).unwrap();
        assert!(connect_to(&other).is_ok());
    }
}
