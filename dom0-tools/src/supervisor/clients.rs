//! The clients of the control socket. None of them can hold the supervisor up.

use crate::ctl::control::Question;
use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Longer than any question: a guest's name has 128 characters at most, and an order 256 events.
const MAX_QUESTION: usize = 16 << 10;
/// When more come, the oldest goes.
const MAX_CLIENTS: usize = 16;

pub(super) struct Clients {
    listener: UnixListener,
    /// Held while this service runs.
    _lock: File,
    clients: BTreeMap<Token, Client>,
}

struct Client {
    socket: UnixStream,
    question: Vec<u8>,
    /// What came beside it.
    descriptor: Option<OwnedFd>,
    asked: bool,
    answer: Vec<u8>,
}

impl Clients {
    /// Listens at `path`, for root only, in place of what an earlier process left there.
    pub(super) fn listen(path: &Path, registry: &Registry, token: Token) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        // Whoever may read it could lock it.
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path.with_extension("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => io::Error::other("another xen-virtiod is running"),
            error => error.into(),
        })?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        registry.register(&mut listener, token, Interest::READABLE)?;
        Ok(Self {
            listener,
            _lock: lock,
            clients: BTreeMap::new(),
        })
    }

    pub(super) fn has(&self, token: Token) -> bool {
        self.clients.contains_key(&token)
    }

    pub(super) fn accept(&mut self, registry: &Registry, next_token: &mut usize) {
        while let Ok((mut socket, _)) = self.listener.accept() {
            let token = Token(*next_token);
            *next_token += 1;
            if self.clients.len() == MAX_CLIENTS {
                self.clients.pop_first();
            }
            if registry
                .register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)
                .is_ok()
            {
                let client = Client {
                    socket,
                    question: Vec::new(),
                    descriptor: None,
                    asked: false,
                    answer: Vec::new(),
                };
                self.clients.insert(token, client);
            }
        }
    }

    /// A client's socket is ready. Its question, once it is complete, and the descriptor that came beside it.
    pub(super) fn ready(
        &mut self,
        token: Token,
        registry: &Registry,
    ) -> Option<(Question, Option<OwnedFd>)> {
        let client = self.clients.get_mut(&token)?;
        if client.asked {
            self.write(token, registry);
            return None;
        }
        match client.read_question() {
            Ok(Some(question)) => {
                client.asked = true;
                Some((question, client.descriptor.take()))
            }
            Ok(None) => None,
            // It has looked whether somebody listens, as doctor does.
            Err(_) if client.question.is_empty() => {
                self.close(token, registry);
                None
            }
            Err(error) => {
                tracing::warn!("a client of the control socket is turned away: {error}");
                self.close(token, registry);
                None
            }
        }
    }

    /// Answers a client, which is then done. One that has gone meanwhile gets nothing.
    pub(super) fn answer(&mut self, token: Token, answer: Vec<u8>, registry: &Registry) {
        if let Some(client) = self.clients.get_mut(&token) {
            client.answer = answer;
            self.write(token, registry);
        }
    }

    fn write(&mut self, token: Token, registry: &Registry) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        while !client.answer.is_empty() {
            match client.socket.write(&client.answer) {
                Ok(len) if len > 0 => drop(client.answer.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                _ => return self.close(token, registry),
            }
            if client.answer.is_empty() {
                return self.close(token, registry);
            }
        }
    }

    fn close(&mut self, token: Token, registry: &Registry) {
        if let Some(mut client) = self.clients.remove(&token) {
            let _ = registry.deregister(&mut client.socket);
        }
    }
}

impl Client {
    /// Reads some of the question, and keeps the descriptor beside it; there is one at most.
    fn receive(&mut self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut parts, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(found) = message {
                self.descriptor = found.last();
            }
        }
        Ok(received.bytes)
    }

    fn read_question(&mut self) -> io::Result<Option<Question>> {
        let mut bytes = [0; MAX_QUESTION];
        loop {
            match self.receive(&mut bytes) {
                Ok(0) => return Ok(Some(serde_json::from_slice(&self.question)?)),
                Ok(len) => self.question.extend_from_slice(&bytes[..len]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            if self.question.len() > MAX_QUESTION {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "the question is too long",
                ));
            }
        }
    }
}
