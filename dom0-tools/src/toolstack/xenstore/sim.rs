//! A xenstored in this process, for tests: nodes and watches, over the real protocol; and domains that may be paused.

use super::wire::{Kind, Message};
use super::{XenStore, strings};
use crate::toolstack::Pause;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

/// What relative paths are relative to.
const HOME: &str = "/local/domain/0/";

/// Clones are the same store.
#[derive(Clone)]
pub(crate) struct SimStore {
    state: Arc<Mutex<State>>,
}

struct State {
    connection: Option<File>,
    nodes: BTreeMap<String, String>,
    watches: Vec<(String, String)>,
    domains: BTreeSet<u16>,
    /// The domains that own a node, where that is not dom0.
    owners: BTreeMap<String, u16>,
    /// Paths below which every request is refused.
    refused: Vec<String>,
    /// How often each domain is paused.
    paused: BTreeMap<u16, u32>,
}

fn absolute(path: &str) -> String {
    if path.starts_with(['/', '@']) {
        path.to_owned()
    } else {
        format!("{HOME}{path}")
    }
}

fn is_below(path: &str, place: &str) -> bool {
    path.strip_prefix(place)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl SimStore {
    /// An empty store, and a connection to it.
    pub(crate) fn new() -> (Self, XenStore) {
        let store = Self {
            state: Arc::new(Mutex::new(State {
                connection: None,
                nodes: BTreeMap::new(),
                watches: Vec::new(),
                domains: BTreeSet::new(),
                owners: BTreeMap::new(),
                refused: Vec::new(),
                paused: BTreeMap::new(),
            })),
        };
        let connection = store.connect();
        (store, connection)
    }

    /// Another connection, in place of the one before.
    pub(crate) fn connect(&self) -> XenStore {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut reader = File::from(OwnedFd::from(ours));
        let mut state = self.state();
        state.connection = Some(reader.try_clone().unwrap());
        state.watches.clear();
        let serving = self.clone();
        std::thread::spawn(move || {
            while let Ok(request) = Message::read(&mut reader) {
                serving.state().answer(&request);
            }
        });
        XenStore::over(File::from(OwnedFd::from(theirs)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn write(&self, path: &str, value: &str) {
        self.state().write(&absolute(path), value);
    }

    pub(crate) fn read(&self, path: &str) -> Option<String> {
        self.state().nodes.get(&absolute(path)).cloned()
    }

    /// Removes a node and all below it.
    pub(crate) fn remove(&self, path: &str) {
        self.state().remove(&absolute(path));
    }

    /// Every request for something below `path` is refused from now on.
    pub(crate) fn refuse(&self, path: &str) {
        self.state().refused.push(absolute(path));
    }

    /// How often domain `domid` is paused.
    pub(crate) fn paused(&self, domid: u16) -> u32 {
        self.state().paused.get(&domid).copied().unwrap_or(0)
    }

    /// A domain, which has `uuid`.
    pub(crate) fn introduce(&self, domid: u16, name: &str, uuid: &str) {
        self.state().domains.insert(domid);
        self.write(&format!("/local/domain/{domid}/name"), name);
        self.write(&format!("/local/domain/{domid}/vm"), &format!("/vm/{uuid}"));
        self.state().fire("@introduceDomain");
    }

    /// A domain that owns its name and uuid, as `init-dom0less` makes it.
    pub(crate) fn introduce_owner(&self, domid: u16, name: &str, uuid: &str) {
        for node in ["name", "vm"] {
            let path = format!("/local/domain/{domid}/{node}");
            self.state().owners.insert(path, domid);
        }
        self.introduce(domid, name, uuid);
    }

    /// The domain is gone, and has left its nodes.
    pub(crate) fn release(&self, domid: u16) {
        let mut state = self.state();
        state.domains.remove(&domid);
        state.fire("@releaseDomain");
    }
}

impl Pause for SimStore {
    fn pause(&self, domid: u16) -> io::Result<()> {
        *self.state().paused.entry(domid).or_default() += 1;
        Ok(())
    }

    fn unpause(&self, domid: u16) -> io::Result<()> {
        let mut state = self.state();
        let count = state.paused.entry(domid).or_default();
        *count = count.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(())
    }
}

impl State {
    fn write(&mut self, path: &str, value: &str) {
        self.nodes.insert(path.to_owned(), value.to_owned());
        self.fire(path);
    }

    fn remove(&mut self, path: &str) {
        self.nodes.retain(|node, _| !is_below(node, path));
        self.fire(path);
    }

    /// Tells those who watch `path`, in the form in which they asked.
    fn fire(&mut self, path: &str) {
        for (place, token) in self.watches.clone() {
            if is_below(path, &absolute(&place)) || is_below(&absolute(&place), path) {
                let shown = if place.starts_with(['/', '@']) {
                    path
                } else {
                    path.strip_prefix(HOME).unwrap_or(&place)
                };
                self.send(
                    Kind::WatchEvent,
                    0,
                    format!("{shown}\0{token}\0").into_bytes(),
                );
            }
        }
    }

    fn send(&mut self, kind: Kind, request: u32, payload: Vec<u8>) {
        let message = Message {
            kind: kind as u32,
            request,
            payload,
        };
        // Whoever listened is gone.
        let _ = self.connection.as_mut().map(|to| message.write(to));
    }

    fn answer(&mut self, message: &Message) {
        let texts = strings(&message.payload);
        let path = absolute(texts.first().map_or("", String::as_str));
        let kind = [
            Kind::Directory,
            Kind::Read,
            Kind::GetPermissions,
            Kind::Watch,
            Kind::Write,
            Kind::Remove,
            Kind::IsDomainIntroduced,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == message.kind);
        let refused = self.refused.iter().any(|place| is_below(&path, place));
        let answer = match kind {
            _ if refused => Err("EACCES"),
            Some(Kind::Read) => self.nodes.get(&path).cloned().ok_or("ENOENT"),
            Some(Kind::GetPermissions) => match self.nodes.contains_key(&path) {
                true => Ok(format!("n{}\0", self.owners.get(&path).unwrap_or(&0))),
                false => Err("ENOENT"),
            },
            Some(Kind::Directory) => self.names(&path).ok_or("ENOENT"),
            Some(Kind::Write) => {
                self.write(&path, texts.get(1).map_or("", String::as_str));
                Ok("OK\0".to_owned())
            }
            Some(Kind::Remove) => {
                self.remove(&path);
                Ok("OK\0".to_owned())
            }
            Some(Kind::Watch) => {
                self.watches.push((texts[0].clone(), texts[1].clone()));
                let (place, token) = (&texts[0], &texts[1]);
                self.send(
                    Kind::WatchEvent,
                    0,
                    format!("{place}\0{token}\0").into_bytes(),
                );
                Ok("OK\0".to_owned())
            }
            Some(Kind::IsDomainIntroduced) => {
                let lives = texts[0]
                    .parse()
                    .is_ok_and(|domid| self.domains.contains(&domid));
                Ok(if lives { "T\0" } else { "F\0" }.to_owned())
            }
            _ => Err("ENOSYS"),
        };
        match answer {
            Ok(text) => self.send(kind.unwrap(), message.request, text.into_bytes()),
            Err(code) => self.send(
                Kind::Error,
                message.request,
                format!("{code}\0").into_bytes(),
            ),
        }
    }

    /// The names of the nodes right below `path`.
    fn names(&self, path: &str) -> Option<String> {
        let below: BTreeSet<&str> = self
            .nodes
            .keys()
            .filter_map(|node| {
                node.strip_prefix(path)?
                    .strip_prefix('/')?
                    .split('/')
                    .next()
            })
            .collect();
        let exists = !below.is_empty() || self.nodes.contains_key(path);
        exists.then(|| below.iter().map(|name| format!("{name}\0")).collect())
    }
}
