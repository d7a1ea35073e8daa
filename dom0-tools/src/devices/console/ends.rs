//! What a port's other ends are in dom0: they stay while workers come and go.

use super::log::{LogKeeper, older};
use super::pty::Pty;
use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use xen_virtio_backend::console::Line;

/// What a port's other ends are, beside whoever is attached to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ends {
    /// A link to its pseudoterminal.
    pub(super) pty: Option<PathBuf>,
    /// A socket.
    pub(super) listen: Option<PathBuf>,
    /// A file, and the KiB from which on another one is begun.
    pub(super) log: Option<PathBuf>,
    pub(super) log_kib: Option<NonZeroU32>,
}

/// Which of a port's ends a worker has descriptors of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortEnds {
    pty: bool,
    log: bool,
}

impl PortEnds {
    /// The most descriptors of one port.
    pub(super) const MAX_DESCRIPTORS: usize = 3;

    /// The lines whose descriptors come next.
    ///
    /// # Errors
    ///
    /// If they are too few.
    pub(super) fn lines(
        self,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Vec<Line>> {
        let mut next = || descriptors.next().context("a port's descriptor is missing");
        let mut lines = Vec::new();
        if self.pty {
            lines.push(Line::Pty {
                master: next()?,
                opened: next()?,
            });
        }
        if self.log {
            lines.push(Line::Log(next()?));
        }
        Ok(lines)
    }
}

/// What stands in dom0 for the ports of all guests.
#[derive(Debug, Default)]
pub(crate) struct Consoles(Vec<Standing>);

/// What stands for one port.
#[derive(Debug)]
struct Standing {
    guest: Identity,
    name: String,
    key: EntryKey,
    port: usize,
    ends: Ends,
    pty: Option<Pty>,
    log: Option<LogKeeper>,
}

impl Consoles {
    /// The device has no ports any more.
    pub(crate) fn end(&mut self, guest: &Identity, key: EntryKey) {
        self.0
            .retain(|standing| standing.guest != *guest || standing.key != key);
    }

    pub(crate) fn end_guest(&mut self, guest: &Identity) {
        self.0.retain(|standing| standing.guest != *guest);
    }
}

impl Ends {
    /// Every path that is taken.
    pub(super) fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let older = self.log.as_deref().map(older);
        let paths = [&self.pty, &self.listen, &self.log];
        paths.into_iter().flatten().cloned().chain(older)
    }

    /// Whether nobody has one of them.
    fn check_unused(&self, consoles: &Consoles) -> Result<()> {
        for path in self.paths() {
            let has_it = |other: &&Standing| other.ends.paths().any(|at| at == path);
            if let Some(other) = consoles.0.iter().find(has_it) {
                bail!("{} is in use: {}", path.display(), other.describe());
            }
        }
        Ok(())
    }

    /// As they are shown.
    pub(super) fn named(&self) -> impl Iterator<Item = String> {
        let ends = [
            ("pty", &self.pty),
            ("socket", &self.listen),
            ("log", &self.log),
        ];
        ends.into_iter()
            .filter_map(|(what, path)| Some(format!("{what} {}", path.as_ref()?.display())))
    }

    /// Opens them for port `number` of a device, or has them as they stand. A guest that has had the port goes on without what
    /// cannot be opened.
    ///
    /// # Errors
    ///
    /// Who else has one of them, or the system's.
    pub(super) fn open(
        &self,
        (guest, name, key): (&Identity, &str, EntryKey),
        number: usize,
        served: bool,
        consoles: &mut Consoles,
    ) -> Result<(PortEnds, Vec<OwnedFd>)> {
        let is_it = |standing: &Standing| {
            standing.guest == *guest && standing.key == key && standing.port == number
        };
        let found = consoles.0.iter().position(is_it);
        let index = match found {
            Some(index) => index,
            None => {
                self.check_unused(consoles)?;
                consoles.0.push(Standing {
                    guest: guest.clone(),
                    name: name.to_owned(),
                    key,
                    port: number,
                    ends: self.clone(),
                    pty: None,
                    log: None,
                });
                consoles.0.len() - 1
            }
        };
        let standing = &mut consoles.0[index];
        if let Err(error) = standing.open() {
            ensure!(served, error);
            tracing::warn!(guest = name, domid = guest.domid, device = %key, "goes on without: {error:#}");
        }
        let mut descriptors = Vec::new();
        if let Some(pty) = &standing.pty {
            descriptors.extend(pty.descriptors()?);
        }
        if let Some(log) = &standing.log {
            descriptors.push(log.descriptor()?);
        }
        let opened = PortEnds {
            pty: standing.pty.is_some(),
            log: standing.log.is_some(),
        };
        Ok((opened, descriptors))
    }
}

impl Standing {
    /// Opens what is not open.
    fn open(&mut self) -> Result<()> {
        if let (Some(link), None) = (&self.ends.pty, &self.pty) {
            self.pty = Some(Pty::new(link)?);
        }
        if let (Some(path), Some(kib), None) = (&self.ends.log, self.ends.log_kib, &self.log) {
            self.log = Some(LogKeeper::new(path, kib.get())?);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!(
            "guest {} ({}) has it: {}",
            self.name, self.guest.domid, self.key
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;
    use rustix::fs::{OFlags, fcntl_getfl};

    const KEY: EntryKey = EntryKey {
        form: EntryForm::Virtio,
        devid: 0,
    };

    fn guest(domid: u16) -> Identity {
        Identity { domid, vm: None }
    }

    #[test]
    fn ends_stand_while_workers_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let ends = Ends {
            pty: Some(folder.path().join("pty")),
            log: Some(folder.path().join("log")),
            log_kib: NonZeroU32::new(1),
            ..Ends::default()
        };
        let mut consoles = Consoles::default();
        let mut open = |domid, served| {
            let guest = guest(domid);
            ends.open((&guest, "g", KEY), 0, served, &mut consoles)
        };
        let (opened, found) = open(3, false).unwrap();
        let slave = std::fs::read_link(folder.path().join("pty")).unwrap();
        assert_eq!(found.len(), 3);
        for fd in &found {
            assert!(fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
        }
        let lines = opened.lines(&mut found.into_iter()).unwrap();
        assert!(matches!(lines[..], [Line::Pty { .. }, Line::Log(_)]));
        // The next worker has the same, and nobody else has.
        open(3, true).unwrap();
        assert_eq!(
            std::fs::read_link(folder.path().join("pty")).unwrap(),
            slave
        );
        let error = open(4, false).unwrap_err().to_string();
        assert!(
            error.contains("pty is in use: guest g (3) has it: virtio/0"),
            "{error}"
        );
        consoles.end(&guest(3), KEY);
        assert!(!folder.path().join("pty").exists());
        assert!(opened.lines(&mut std::iter::empty()).is_err());
    }

    #[test]
    fn a_guest_that_has_had_a_port_goes_on_without_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("log");
        let ends = Ends {
            log: Some(path.clone()),
            log_kib: NonZeroU32::new(1),
            ..Ends::default()
        };
        let mut consoles = Consoles::default();
        let guest = guest(3);
        let mut open = |served| ends.open((&guest, "g", KEY), 0, served, &mut consoles);
        let error = format!("{:#}", open(false).unwrap_err());
        assert!(error.contains("opening the log"), "{error}");
        let (opened, found) = open(true).unwrap();
        assert_eq!((opened, found.len()), (PortEnds::default(), 0));
        // Its next worker has it, if that can be.
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        assert_eq!(open(true).unwrap().1.len(), 1);
    }
}
