//! What a person orders of a guest's device that runs.

use super::{Guest, WorkerContext};
use crate::devices::{Changed, Order};
use crate::ipc::ToWorker;
use crate::supervisor::entry::DeviceEntry;
use crate::supervisor::guest::Untaken;
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags, open, readlinkat};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

impl Guest {
    /// Changes the device that is known as `device`, by its entry or its vdev, or the only one that can be changed so. What comes
    /// beside the order is the device's. Which it is, and what was done.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub(in crate::supervisor) fn change(
        &mut self,
        device: Option<&str>,
        order: Order,
        descriptor: Option<OwnedFd>,
        context: &mut WorkerContext<'_>,
    ) -> Result<(EntryKey, String)> {
        let key = match device {
            Some(device) => self.find(device, context)?,
            None => self.only_with(order.part())?,
        };
        let known = self.served(key)?;
        ensure!(
            descriptor.is_some() || !matches!(order, Order::Attach { .. }),
            "no connection came to be attached"
        );
        let kept = context.files.kept(&self.identity, key)?;
        let changed = known.change(order, kept);
        let Changed { done, kept, change } = changed.with_context(|| key.to_string())?;
        if let Some(kept) = kept {
            context.files.keep(&self.identity, key, Some(kept))?;
        }
        // A worker that dies before it is told is followed by one that is told this.
        let fds: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        if let Some(broken) = self.send_with(&ToWorker::Change { key, change }, &fds) {
            self.handle(broken, context)?;
        }
        Ok((key, done))
    }

    /// Has the requests of `device` told of by the pipe `descriptor`. Which it is.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub(in crate::supervisor) fn trace(
        &mut self,
        device: &str,
        goes_on: bool,
        descriptor: Option<OwnedFd>,
        context: &mut WorkerContext<'_>,
    ) -> Result<String> {
        let key = self.find(device, context)?;
        let known = self.served(key)?;
        ensure!(
            !known.is_slot(),
            "{key} is an empty slot, which has no requests"
        );
        let detail = known.detail.clone();
        let pipe = pipe_for_worker(descriptor.context("no pipe came for what is told")?)?;
        match self.send_about(key, &ToWorker::Trace { key, goes_on }, Some(&pipe)) {
            Ok(()) => Ok(format!("{key}: {detail}")),
            Err(Untaken::Now) => bail!("the worker of {key} is too busy to be told: try again"),
            Err(Untaken::Ever(event)) => {
                self.handle(event, context)?;
                bail!("the worker of {key} has just ended: try again")
            }
        }
    }

    /// The device of entry `key`, which its worker has.
    fn served(&self, key: EntryKey) -> Result<&DeviceEntry> {
        ensure!(self.has_handed(key), "{key} is not served now");
        Ok(&self.lifecycle.entries[&key])
    }

    pub(super) fn find(&self, device: &str, context: &mut WorkerContext<'_>) -> Result<EntryKey> {
        let domid = self.domid();
        let mut found = None;
        for key in self.lifecycle.entries.keys() {
            let name = context.toolstack.device_name(domid, *key)?;
            if key.to_string() == device || name.as_deref() == Some(device) {
                found = Some(*key);
            }
        }
        let entries: Vec<_> = self
            .lifecycle
            .entries
            .keys()
            .map(EntryKey::to_string)
            .collect();
        found.with_context(|| format!("it has no device {device}, but {}", entries.join(", ")))
    }

    /// The only device that has such a part.
    fn only_with(&self, part: &str) -> Result<EntryKey> {
        let entries = self.lifecycle.entries.iter();
        let mut found = entries.filter(|(_, known)| known.has_part(part));
        let (key, _) = found
            .next()
            .with_context(|| format!("it has no device with {part}"))?;
        let others: Vec<_> = found.map(|(other, _)| format!(" and {other}")).collect();
        ensure!(
            others.is_empty(),
            "{key}{} have {part}: name one",
            others.concat()
        );
        Ok(*key)
    }
}

/// The writing end of a client's pipe, as a worker may have it: opened once more, so that nobody else can have it block.
fn pipe_for_worker(descriptor: OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    // Whoever has a pipe in a file system could have us wait for that.
    let name = readlinkat(CWD, &path, Vec::new())?;
    ensure!(
        name.as_bytes().starts_with(b"pipe:["),
        "what came for what is told is no pipe"
    );
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}
