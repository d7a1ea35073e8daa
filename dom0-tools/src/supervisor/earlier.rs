//! The workers that an earlier supervisor has left behind.

use crate::sandbox;
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

/// A process that cannot be mistaken for another one.
struct Process {
    pid: Pid,
    file: OwnedFd,
}

/// The workers of guest `domid`, by their user, which is nobody else's.
fn find(domid: u16) -> Result<Vec<Process>> {
    let user = sandbox::user(domid);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        // Looked at twice: before, so that not every process is opened, and when it cannot be another one
        // any more. One that has ended has no user.
        let is_worker = || entry.metadata().is_ok_and(|status| status.uid() == user);
        if !is_worker() {
            continue;
        }
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(file) if is_worker() => found.push(Process { pid, file }),
            Ok(_) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).context("opening an earlier worker's process"),
        }
    }
    Ok(found)
}

/// Whether an earlier supervisor's worker serves guest `domid`.
///
/// # Errors
///
/// The system's.
pub(super) fn has_workers(domid: u16) -> Result<bool> {
    Ok(!find(domid)?.is_empty())
}

/// Ends the workers of guest `domid`, whose memory and event channels the next one can have then.
///
/// # Errors
///
/// If one does not end.
pub(super) fn end_workers(domid: u16) -> Result<()> {
    for Process { pid, file } in find(domid)? {
        // An error means that it has ended.
        let _ = pidfd_send_signal(&file, Signal::KILL);
        let mut fds = [PollFd::new(&file, PollFlags::IN)];
        let pid = pid.as_raw_nonzero();
        if poll(&mut fds, Some(&LIMIT))? == 0 {
            bail!("its earlier worker {pid} does not end: is its disk stuck?");
        }
        tracing::info!("guest {domid}: took over from its earlier worker {pid}");
    }
    Ok(())
}
