//! The workers that an earlier supervisor has left behind.

mod duplicates;

use super::state_files::Shared;
use crate::devices::Inherited;
use crate::worker::sandbox;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

/// How long one may take to end, when it is waiting for a disk.
const LIMIT: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// A worker, which cannot be mistaken for another process.
struct Process {
    domid: u16,
    pid: Pid,
    file: OwnedFd,
}

impl Process {
    /// # Errors
    ///
    /// If it does not end.
    fn end(&self) -> Result<()> {
        // An error means that it has ended.
        let _ = pidfd_send_signal(&self.file, Signal::KILL);
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        if poll(&mut fds, Some(&LIMIT))? == 0 {
            bail!(
                "its earlier worker {} does not end: is its disk stuck?",
                self.pid()
            );
        }
        Ok(())
    }

    fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }
}

/// The workers that there are, by their user, which is nobody else's.
fn find() -> Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        // Looked at twice: before, so that not every process is opened, and when it cannot be another one
        // any more. One that has ended has no user.
        let guest = || sandbox::guest_of(entry.metadata().ok()?.uid());
        let Some(domid) = guest() else {
            continue;
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(file) if guest() == Some(domid) => found.push(Process { domid, pid, file }),
            Ok(_) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).context("opening an earlier worker's process"),
        }
    }
    Ok(found)
}

fn find_of(domid: u16) -> Result<impl Iterator<Item = Process>> {
    let found = find()?.into_iter();
    Ok(found.filter(move |process| process.domid == domid))
}

/// Whether an earlier supervisor's worker serves guest `domid`.
///
/// # Errors
///
/// The system's.
pub(super) fn has_workers(domid: u16) -> Result<bool> {
    Ok(find_of(domid)?.next().is_some())
}

/// What an earlier supervisor's worker of guest `domid` shares with a back-end, if it still does.
pub(super) fn shared_by(domid: u16, shared: Shared) -> Option<Inherited> {
    find_of(domid)
        .ok()?
        .find_map(|process| duplicates::of(&process.file, process.pid(), shared))
}

/// Ends the workers of guest `domid`, whose memory and event channels the next one can have then.
///
/// # Errors
///
/// If one does not end.
pub(super) fn end_workers(domid: u16) -> Result<()> {
    for process in find_of(domid)? {
        process.end()?;
        tracing::info!(domid, "took over from its earlier worker {}", process.pid());
    }
    Ok(())
}

/// Ends the workers whose guest does not live any more. They end by themselves, unless their guest has taken
/// them over.
///
/// # Errors
///
/// The system's, and what `lives` says.
pub(super) fn end_orphans<E>(mut lives: impl FnMut(u16) -> Result<bool, E>) -> Result<()>
where
    anyhow::Error: From<E>,
{
    for process in find()? {
        if !lives(process.domid)? {
            let pid = process.pid();
            tracing::info!("worker {pid} is ended: its guest {} is gone", process.domid);
            if let Err(error) = process.end() {
                tracing::error!(domid = process.domid, "{error:#}");
            }
        }
    }
    Ok(())
}
