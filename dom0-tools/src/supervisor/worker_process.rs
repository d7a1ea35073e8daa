//! A worker as its supervisor sees it: a process, and the connection to it.

use crate::ipc::{Channel, FromWorker, ToWorker};
use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::EventChannels;

/// The argument that makes `xen-virtiod` a worker; its standard input is the connection.
pub(crate) const WORKER_ARGUMENT: &str = "worker";

#[derive(Debug)]
pub(super) struct WorkerProcess {
    child: Child,
    channel: Channel,
    token: Token,
}

impl WorkerProcess {
    /// Starts a worker for `domid`, with what it may use of Xen.
    pub(super) fn start(domid: u16, registry: &Registry, token: Token) -> Result<Self> {
        let (channel, theirs) = Channel::pair()?;
        let privcmd = open("/dev/xen/privcmd", 0)?;
        Privcmd::restrict(&privcmd, Domid(domid)).context("restricting privcmd to the guest")?;
        let evtchn = open("/dev/xen/evtchn", rustix::fs::OFlags::NONBLOCK.bits())?;
        EventChannels::restrict(&evtchn, Domid(domid))
            .context("restricting evtchn to the guest")?;
        let gntdev = open("/dev/xen/gntdev", 0)?;
        let child = Command::new("/proc/self/exe")
            .arg0("xen-virtiod")
            .arg(WORKER_ARGUMENT)
            .arg(domid.to_string())
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("starting a worker process")?;
        registry.register(
            &mut SourceFd(&channel.as_fd().as_raw_fd()),
            token,
            Interest::READABLE,
        )?;
        let worker = Self {
            child,
            channel,
            token,
        };
        worker.send(
            &ToWorker::Start { domid },
            &[privcmd.as_fd(), evtchn.as_fd(), gntdev.as_fd()],
        )?;
        Ok(worker)
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn send(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.channel.send(message, fds)
    }

    /// The next message, if there is one; an error once the worker has ended.
    pub(super) fn receive(&self) -> io::Result<Option<FromWorker>> {
        Ok(self.channel.receive()?.map(|(message, _)| message))
    }

    /// Whether the worker has let go of the connection. Messages that are still in it are dropped.
    pub(super) fn has_ended(&self) -> bool {
        loop {
            match self.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    pub(super) fn kill(&mut self) {
        tracing::warn!("worker {} does not end, and is killed", self.pid());
        // An error means that it has ended.
        let _ = self.child.kill();
    }

    /// Waits for a worker that has let go of the connection: it is ending, or is made to.
    pub(super) fn reap(mut self, registry: &Registry) -> Option<ExitStatus> {
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_fd().as_raw_fd()));
        match self.child.try_wait() {
            Ok(Some(status)) => Some(status),
            _ => self.child.wait().ok(),
        }
    }
}

fn open(path: &str, flags: u32) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.try_into()?)
        .open(path)
        .with_context(|| {
            format!("opening {path}: is this a Xen domain, with the kernel's Xen devices?")
        })
}
