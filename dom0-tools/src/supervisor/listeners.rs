//! The sockets at which the supervisor listens for devices, whose workers can open nothing: each connection is handed on.

use crate::connections::listen;
use crate::devices::Listen;
use crate::toolstack::libxl::EntryKey;
use anyhow::Result;
use mio::net::UnixListener;
use mio::{Interest, Registry, Token};
use rustix::fs::Mode;
use serde_json::Value;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A device of the guest of this domid.
type Device = (u16, EntryKey);

/// For root only.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Connections that are taken at once.
const AT_ONCE: usize = 16;

#[derive(Default)]
pub(super) struct Listeners(Vec<Listener>);

struct Listener {
    token: Token,
    device: Device,
    path: PathBuf,
    socket: UnixListener,
    /// What a device is told with a connection.
    change: Value,
}

impl Listeners {
    pub(super) fn has(&self, token: Token) -> bool {
        self.0.iter().any(|listener| listener.token == token)
    }

    /// Listens at `wanted` for a device, and nowhere else: for root only. Where it does so already, it goes on.
    ///
    /// # Errors
    ///
    /// What keeps it from listening at one of them.
    pub(super) fn have(
        &mut self,
        device: Device,
        wanted: Vec<Listen>,
        registry: &Registry,
        next_token: &mut usize,
    ) -> Result<()> {
        let is_wanted = |path: &PathBuf| wanted.iter().any(|listen| listen.path == *path);
        self.end_those(registry, |other| {
            other.device == device && !is_wanted(&other.path)
        });
        for Listen { path, change } in wanted {
            let is_it = |other: &Listener| other.device == device && other.path == path;
            if self.0.iter().any(is_it) {
                continue;
            }
            let socket = listen(&path, PRIVATE)?;
            socket.set_nonblocking(true)?;
            let mut socket = UnixListener::from_std(socket);
            let token = Token(*next_token);
            *next_token += 1;
            registry.register(&mut socket, token, Interest::READABLE)?;
            self.0.push(Listener {
                token,
                device,
                path,
                socket,
                change,
            });
        }
        Ok(())
    }

    /// Nobody connects to the device any more.
    pub(super) fn end(&mut self, device: Device, registry: &Registry) {
        self.end_those(registry, |listener| listener.device == device);
    }

    pub(super) fn end_guest(&mut self, domid: u16, registry: &Registry) {
        self.end_those(registry, |listener| listener.device.0 == domid);
    }

    fn end_those(&mut self, registry: &Registry, is_it: impl Fn(&Listener) -> bool) {
        for mut listener in self.0.extract_if(.., |listener| is_it(listener)) {
            let _ = registry.deregister(&mut listener.socket);
            let _ = fs::remove_file(&listener.path);
        }
    }

    /// Some connections to the socket of `token`: whose each is, and what that is told.
    pub(super) fn accept(
        &mut self,
        token: Token,
        registry: &Registry,
    ) -> Vec<(Device, Value, OwnedFd)> {
        let mut listeners = self.0.iter_mut();
        let Some(listener) = listeners.find(|listener| listener.token == token) else {
            return Vec::new();
        };
        let mut accepted = Vec::new();
        while let Ok((connection, _)) = listener.socket.accept() {
            accepted.push((listener.device, listener.change.clone(), connection.into()));
            if accepted.len() == AT_ONCE {
                // Others of the service's have their turn; then it is told of those that wait.
                let socket = &mut listener.socket;
                let _ = registry.reregister(socket, token, Interest::READABLE);
                break;
            }
        }
        accepted
    }
}
