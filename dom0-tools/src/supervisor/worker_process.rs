//! A worker as its supervisor sees it: a process, and the connection to it.

use super::conversation::Conversation;
use super::worker_log::WorkerLog;
use crate::config::Config;
use crate::ipc::{SupervisorEnd, ToWorker, WorkerEnds};
use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use tracing::Level;
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::EventChannels;

/// The argument that makes `xen-virtiod` a worker; its standard input and output are the connection.
pub(crate) const WORKER_ARGUMENT: &str = "worker";

/// How a worker comes to be.
pub(super) trait Launcher {
    /// A process for guest `domid`, whose standard input and output are `ends`.
    ///
    /// # Errors
    ///
    /// What keeps it from being started.
    fn launch(&self, domid: u16, ends: WorkerEnds) -> Result<Launched>;
}

/// A new process, and what it may use of Xen.
pub(super) struct Launched {
    pub(super) child: Child,
    pub(super) privcmd: File,
    pub(super) evtchn: File,
    pub(super) gntdev: File,
}

/// Launches this program once more, with Xen's devices restricted to the guest as far as they can be.
pub(super) struct XenLauncher;

impl Launcher for XenLauncher {
    fn launch(&self, domid: u16, ends: WorkerEnds) -> Result<Launched> {
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
            .stdin(Stdio::from(ends.commands))
            .stdout(Stdio::from(ends.answers))
            // The service's own log is not a worker's to write.
            .stderr(Stdio::piped())
            // An interrupt from the terminal is the supervisor's; a worker serves on.
            .process_group(0)
            .spawn()
            .context("starting a worker process")?;
        Ok(Launched {
            child,
            privcmd,
            evtchn,
            gntdev,
        })
    }
}

#[derive(Debug)]
pub(super) struct WorkerProcess {
    child: Child,
    pub(super) conversation: Conversation,
    /// Its log lines, until there will be no more.
    log: Option<WorkerLog>,
    token: Token,
    /// It has been killed; readable when it has died.
    dying: Option<OwnedFd>,
}

impl WorkerProcess {
    /// Tokens that a worker has: of its conversation, and the one after it of its log.
    pub(super) const TOKENS: usize = 2;

    /// Starts a worker for `domid`, with what it may use of Xen, and the guest's state. `token` is the first of its
    /// own [`WorkerProcess::TOKENS`].
    pub(super) fn start(
        launcher: &dyn Launcher,
        domid: u16,
        state: &File,
        config: &Config,
        registry: &Registry,
        token: Token,
    ) -> Result<Self> {
        let (end, theirs) = SupervisorEnd::pair()?;
        let Launched {
            mut child,
            privcmd,
            evtchn,
            gntdev,
        } = launcher.launch(domid, theirs)?;
        let log = child.stderr.take().map(WorkerLog::new);
        let mut worker = Self {
            child,
            conversation: Conversation::new(end),
            log: log.and_then(Result::ok),
            token,
            dying: None,
        };
        let fds = [
            privcmd.as_fd(),
            evtchn.as_fd(),
            gntdev.as_fd(),
            state.as_fd(),
        ];
        let start = ToWorker::Start {
            domid,
            poll_limit_us: config.polling.limit_us,
            cpu_percent: config.limits.cpu_percent,
        };
        let begun = worker
            .register(registry)
            .and_then(|()| worker.conversation.send(&start, &fds));
        match begun {
            Ok(()) => Ok(worker),
            Err(error) => {
                worker.kill(registry);
                // It has not begun with anything that could hold it.
                let _ = worker.child.wait();
                Err(error).context("speaking to a new worker process")
            }
        }
    }

    fn register(&self, registry: &Registry) -> io::Result<()> {
        let log = self.log.as_ref().map(WorkerLog::raw_fd);
        let sources = [(Some(self.raw_fd()), self.token), (log, self.log_token())];
        for (fd, token) in sources {
            if let Some(fd) = fd {
                registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
            }
        }
        Ok(())
    }

    fn raw_fd(&self) -> RawFd {
        self.conversation.as_fd().as_raw_fd()
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    fn log_token(&self) -> Token {
        Token(self.token.0 + 1)
    }

    /// Whether `token` is one of its own.
    pub(super) fn has(&self, token: Token) -> bool {
        token == self.token || token == self.log_token()
    }

    /// Hands what it has logged to `line`, if `token` is its log's.
    pub(super) fn read_log(
        &mut self,
        token: Token,
        registry: &Registry,
        line: impl FnMut(Level, &str),
    ) {
        if token != self.log_token() {
            return;
        }
        if let Some(log) = &mut self.log
            && !log.read(line)
        {
            let _ = registry.deregister(&mut SourceFd(&log.raw_fd()));
            self.log = None;
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Hands to `line` what is left in the log of a worker that has died.
    pub(super) fn drain_log(&mut self, line: impl FnMut(Level, &str)) {
        if let Some(log) = &mut self.log {
            log.read(line);
        }
    }

    /// Ends a worker that is not to be heard any more, without waiting for it: its token is ready when
    /// [`WorkerProcess::death`] is to be asked.
    pub(super) fn kill(&mut self, registry: &Registry) {
        if self.dying.is_some() {
            return;
        }
        let _ = registry.deregister(&mut SourceFd(&self.raw_fd()));
        // An error means that it has ended.
        let _ = self.child.kill();
        let pid = self.pid().try_into().ok().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        self.dying = process.filter(|process| {
            let mut source = SourceFd(&process.as_raw_fd());
            registry
                .register(&mut source, self.token, Interest::READABLE)
                .is_ok()
        });
        if self.dying.is_none() {
            // Without descriptors to spare there is nothing else to wait with.
            let _ = self.child.wait();
        }
    }

    /// How it died, once it has.
    pub(super) fn death(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
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
