//! The pseudoterminal of a port, and the link to it.

use anyhow::{Context, Result, bail};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(super) struct Pty {
    link: PathBuf,
    slave: PathBuf,
    master: OwnedFd,
    /// Readable when somebody has opened the slave.
    opened: OwnedFd,
}

impl Pty {
    /// A new one, with a link at `link`.
    ///
    /// # Errors
    ///
    /// The system's, or if something else is at `link`.
    pub(super) fn new(link: &Path) -> Result<Self> {
        let (master, opened, slave) = make().context("making a pseudoterminal")?;
        put_link(&slave, link)?;
        Ok(Self {
            link: link.to_owned(),
            slave,
            master,
            opened,
        })
    }

    /// For a worker.
    pub(super) fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.master.try_clone()?, self.opened.try_clone()?])
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        // Somebody may have put something else there.
        if fs::read_link(&self.link).is_ok_and(|to| to == self.slave) {
            let _ = fs::remove_file(&self.link);
        }
    }
}

/// A master that does not block, what tells of its slave's being opened, and the slave's path.
fn make() -> io::Result<(OwnedFd, OwnedFd, PathBuf)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ptsname(&master, Vec::new())?;
    // What the guest's own terminal does must not be done twice. Closed again, the slave counts as open to nobody.
    let terminal = open(
        &slave,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut attributes = tcgetattr(&terminal)?;
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes)?;
    drop(terminal);
    let opened = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&opened, &slave, WatchFlags::OPEN)?;
    let slave = PathBuf::from(OsStr::from_bytes(slave.as_bytes()));
    Ok((master, opened, slave))
}

/// Puts a link to `slave` at `link`, in place of one that an earlier process has left there.
fn put_link(slave: &Path, link: &Path) -> Result<()> {
    let place = link.display();
    match fs::symlink_metadata(link) {
        Ok(there) if !there.is_symlink() => bail!("{place} is there already, and is no link"),
        Ok(_) => fs::remove_file(link).with_context(|| format!("removing {place}"))?,
        Err(_) => {}
    }
    symlink(slave, link).with_context(|| format!("making the link {place}"))
}
