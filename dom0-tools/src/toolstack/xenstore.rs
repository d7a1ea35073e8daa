//! A client of xenstored (`docs/misc/xenstore.txt` of Xen): reads, writes and watches.
//!
//! The one Rust client on crates.io is GPL; the protocol is small.

#[cfg(test)]
pub(crate) mod sim;
mod wire;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use wire::{Kind, Message};

/// Where xenstored listens in dom0, and the kernel's door to it elsewhere.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
const DEVICE: &str = "/dev/xen/xenbus";

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum XenStoreError {
    #[error("cannot reach xenstored at {} or {DEVICE}: is it running, and are you root in a Xen domain?", SOCKETS[0])]
    Connect(#[source] io::Error),
    #[error("the connection to xenstored broke")]
    Connection(#[from] io::Error),
    #[error("xenstored refuses to {what} {path}: {code}")]
    Refused {
        what: &'static str,
        path: String,
        code: String,
    },
}

/// A watch fired: something at or below `path` changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    pub path: String,
    pub token: String,
}

/// A connection to xenstored.
#[derive(Debug)]
pub struct XenStore {
    connection: File,
    next_request: u32,
    events: VecDeque<WatchEvent>,
}

impl XenStore {
    /// # Errors
    ///
    /// [`XenStoreError::Connect`].
    pub fn connect() -> Result<Self, XenStoreError> {
        let connection = SOCKETS
            .iter()
            .map(|path| {
                UnixStream::connect(Path::new(path)).map(|socket| File::from(OwnedFd::from(socket)))
            })
            .find(Result::is_ok)
            .unwrap_or_else(|| OpenOptions::new().read(true).write(true).open(DEVICE))
            .map_err(XenStoreError::Connect)?;
        Ok(Self::over(connection))
    }

    /// A client that speaks through `connection`.
    pub fn over(connection: File) -> Self {
        Self {
            connection,
            next_request: 0,
            events: VecDeque::new(),
        }
    }

    /// The value at `path`, `None` if there is no such node.
    ///
    /// # Errors
    ///
    /// [`XenStoreError`] for anything else than a node that is not there.
    pub fn read(&mut self, path: &str) -> Result<Option<String>, XenStoreError> {
        let answer = self.request(Kind::Read, "read", &[path.as_bytes(), b"\0"])?;
        Ok(answer.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The domain that owns the node at `path`, and may write it whatever else its permissions say; `None` if there is no
    /// such node.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn owner(&mut self, path: &str) -> Result<Option<u16>, XenStoreError> {
        let what = "ask for the owner of";
        let answer = self.request(Kind::GetPermissions, what, &[path.as_bytes(), b"\0"])?;
        // The first permission is the owner's: a letter for all others, and its domid.
        let first = answer.and_then(|answer| strings(&answer).into_iter().next());
        Ok(first.and_then(|first| first.get(1..)?.parse().ok()))
    }

    /// The names of the nodes below `path`; none if there is no such node.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn directory(&mut self, path: &str) -> Result<Vec<String>, XenStoreError> {
        let answer = self
            .request(Kind::Directory, "list", &[path.as_bytes(), b"\0"])?
            .unwrap_or_default();
        Ok(strings(&answer))
    }

    /// Sets a node's value. False if it was not there and could not be made.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn write(&mut self, path: &str, value: &str) -> Result<bool, XenStoreError> {
        Ok(self
            .request(
                Kind::Write,
                "write",
                &[path.as_bytes(), b"\0", value.as_bytes()],
            )?
            .is_some())
    }

    /// Removes a node and all below it, if it is there.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn remove(&mut self, path: &str) -> Result<(), XenStoreError> {
        self.request(Kind::Remove, "remove", &[path.as_bytes(), b"\0"])
            .map(drop)
    }

    /// Asks for a [`WatchEvent`] with `token` now, and whenever something at or below `path` changes.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), XenStoreError> {
        self.request(
            Kind::Watch,
            "watch",
            &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"],
        )
        .map(drop)
    }

    /// Whether xenstored knows the domain: false once it has been destroyed.
    ///
    /// # Errors
    ///
    /// As [`XenStore::read`].
    pub fn is_introduced(&mut self, domid: u16) -> Result<bool, XenStoreError> {
        let name = domid.to_string();
        let answer = self.request(
            Kind::IsDomainIntroduced,
            "ask about domain",
            &[name.as_bytes(), b"\0"],
        )?;
        Ok(answer.is_some_and(|answer| answer.starts_with(b"T")))
    }

    /// The next event that has arrived, without waiting for one.
    ///
    /// # Errors
    ///
    /// [`XenStoreError::Connection`].
    pub fn next_event(&mut self) -> Result<Option<WatchEvent>, XenStoreError> {
        while self.events.is_empty() && self.is_readable()? {
            // No request is open, so that whatever comes is an event, or an answer to nothing.
            let message = Message::read(&mut self.connection)?;
            self.take_event(message);
        }
        Ok(self.events.pop_front())
    }

    fn is_readable(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.connection, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        Ok(poll(&mut fds, Some(&now))? > 0)
    }

    fn take_event(&mut self, message: Message) {
        if message.kind == Kind::WatchEvent as u32
            && let [path, token, ..] = &strings(&message.payload)[..]
        {
            self.events.push_back(WatchEvent {
                path: path.clone(),
                token: token.clone(),
            });
        }
    }

    /// Sends a request and waits for its answer; `None` for a node that does not exist.
    fn request(
        &mut self,
        kind: Kind,
        what: &'static str,
        parts: &[&[u8]],
    ) -> Result<Option<Vec<u8>>, XenStoreError> {
        self.next_request = self.next_request.wrapping_add(1);
        let id = self.next_request;
        Message {
            kind: kind as u32,
            request: id,
            payload: parts.concat(),
        }
        .write(&mut self.connection)?;
        loop {
            let message = Message::read(&mut self.connection)?;
            if message.kind == Kind::WatchEvent as u32 {
                self.take_event(message);
            } else if message.request != id {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "an answer to no request of ours",
                )
                .into());
            } else if message.kind == Kind::Error as u32 {
                let code = strings(&message.payload).pop().unwrap_or_default();
                if code == "ENOENT" {
                    return Ok(None);
                }
                let path = String::from_utf8_lossy(parts[0]).into_owned();
                return Err(XenStoreError::Refused { what, path, code });
            } else {
                return Ok(Some(message.payload));
            }
        }
    }
}

impl AsFd for XenStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// The NUL-terminated strings of a payload.
fn strings(payload: &[u8]) -> Vec<String> {
    payload
        .split(|byte| *byte == 0)
        .filter(|string| !string.is_empty())
        .map(|string| String::from_utf8_lossy(string).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A xenstored that sends `answers`, kind and payload, each to the request before it.
    fn answering(answers: Vec<(Kind, &'static [u8])>) -> XenStore {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut connection = File::from(OwnedFd::from(theirs));
            let mut id = 0;
            for (kind, payload) in answers {
                if kind as u32 != Kind::WatchEvent as u32 {
                    id = Message::read(&mut connection).unwrap().request;
                }
                Message {
                    kind: kind as u32,
                    request: id,
                    payload: payload.to_vec(),
                }
                .write(&mut connection)
                .unwrap();
            }
        });
        XenStore::over(File::from(OwnedFd::from(ours)))
    }

    #[test]
    fn a_missing_node_is_no_error() {
        let mut store = answering(vec![
            (Kind::Error, b"ENOENT\0"),
            (Kind::Read, b"2"),
            (Kind::Error, b"EACCES\0"),
        ]);
        assert_eq!(store.read("state").unwrap(), None);
        assert_eq!(store.read("state").unwrap().as_deref(), Some("2"));
        let error = store.read("/secret").unwrap_err().to_string();
        assert!(
            error.contains("/secret") && error.contains("EACCES"),
            "{error}"
        );
    }

    #[test]
    fn an_event_that_overtakes_an_answer_is_kept() {
        let event = b"backend/virtio_disk/3/51712/state\0disks\0";
        let mut store = answering(vec![
            (Kind::WatchEvent, event),
            (Kind::Directory, b"0\x001\0"),
        ]);
        assert_eq!(store.directory("x").unwrap(), ["0", "1"]);
        let event = store.next_event().unwrap().unwrap();
        assert_eq!(
            (&*event.path, &*event.token),
            ("backend/virtio_disk/3/51712/state", "disks")
        );
    }

    #[test]
    fn a_broken_connection_is_an_error_and_no_hang() {
        assert!(answering(vec![]).read("state").is_err());
    }
}
