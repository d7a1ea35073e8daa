//! The state files of the guests: handed to workers, removed with the guests. They outlive every process and
//! not the host.

use crate::state;
use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where they are.
pub(super) const DIRECTORY: &str = "/run/xen-virtiod/state";

pub(super) struct StateFiles {
    directory: PathBuf,
}

/// Tells a guest from all others, whether they have had its domid or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) domid: u16,
    /// The path of its uuid in xenstore.
    pub(super) vm: Option<String>,
}

impl Identity {
    fn file_name(&self) -> String {
        let uuid = self.vm.as_deref().and_then(|vm| vm.rsplit('/').next());
        format!("{}-{}", self.domid, uuid.unwrap_or("none"))
    }
}

impl StateFiles {
    /// The files below `directory`, for root only.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let what = || format!("making {}", directory.display());
        fs::create_dir_all(directory).with_context(what)?;
        fs::set_permissions(directory, Permissions::from_mode(0o700)).with_context(what)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    fn path(&self, guest: &Identity) -> PathBuf {
        self.directory.join(guest.file_name())
    }

    /// Whether the guest has been served.
    pub(super) fn has(&self, guest: &Identity) -> bool {
        self.path(guest).exists()
    }

    /// The guest's file, a new one if it has none.
    pub(super) fn open(&self, guest: &Identity) -> Result<File> {
        let path = self.path(guest);
        let open = || -> io::Result<File> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            if file.metadata()?.len() == 0 {
                file.set_len(state::BYTES as u64)?;
            }
            if file.metadata()?.len() != state::BYTES as u64 {
                return Err(io::Error::other(
                    "it has another length than this version's: start the one again that made it",
                ));
            }
            Ok(file)
        };
        open().with_context(|| format!("opening the guest's state, {}", path.display()))
    }

    /// Sees to it that there is room for all of the guest's state: a worker that found none when it writes, or
    /// reads what was never written, would be killed.
    pub(super) fn reserve(&self, guest: &Identity) -> Result<()> {
        let file = self.open(guest)?;
        fallocate(&file, FallocateFlags::empty(), 0, state::BYTES as u64).with_context(|| {
            format!(
                "making room for {} bytes in {}",
                state::BYTES,
                self.path(guest).display()
            )
        })
    }

    /// Removes the file of a guest that is gone.
    pub(super) fn remove(&self, guest: &Identity) {
        if let Err(error) = fs::remove_file(self.path(guest))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{} cannot be removed: {error}", self.path(guest).display());
        }
    }

    /// Removes the files of guests that are not what `identify` finds behind their domid.
    pub(super) fn sweep<E>(
        &self,
        mut identify: impl FnMut(u16) -> Result<Option<Identity>, E>,
    ) -> Result<()>
    where
        anyhow::Error: From<E>,
    {
        for file in fs::read_dir(&self.directory)?.flatten() {
            let name = file.file_name();
            let domid = name
                .to_str()
                .and_then(|name| name.split_once('-')?.0.parse().ok());
            let lives = match domid {
                Some(domid) => identify(domid)?,
                None => None,
            };
            if lives.is_none_or(|guest| guest.file_name() != *name.to_string_lossy()) {
                tracing::info!("the guest of {} is gone", file.path().display());
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(domid: u16, vm: &str) -> Identity {
        Identity {
            domid,
            vm: Some(format!("/vm/{vm}")),
        }
    }

    #[test]
    fn files_belong_to_guests_and_not_to_their_domids() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateFiles::new(&directory.path().join("state")).unwrap();
        let guests = [guest(1, "a-b"), guest(2, "c"), guest(3, "d")];
        for guest in &guests {
            assert!(!files.has(guest));
            files.reserve(guest).unwrap();
            let len = files.open(guest).unwrap().metadata().unwrap().len();
            assert_eq!(len, state::BYTES as u64);
        }
        assert!(!files.has(&guest(1, "c")));
        // Another guest has domid 2 now, and domid 3 is nobody's.
        let now = |domid| match domid {
            1 => Ok(Some(guest(1, "a-b"))),
            2 => Ok(Some(guest(2, "e"))),
            _ => Ok::<_, io::Error>(None),
        };
        files.sweep(now).unwrap();
        assert_eq!(
            guests.each_ref().map(|guest| files.has(guest)),
            [true, false, false]
        );
        files.remove(&guests[0]);
        files.remove(&guests[0]);
        assert!(!files.has(&guests[0]));
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateFiles::new(directory.path()).unwrap();
        let guest = guest(1, "a");
        fs::write(files.path(&guest), "short").unwrap();
        let error = format!("{:#}", files.open(&guest).unwrap_err());
        assert!(error.contains("1-a") && error.contains("length"), "{error}");
    }
}
