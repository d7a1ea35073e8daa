//! The files of the guests: the state that is handed to workers, and what the supervisor itself keeps of their devices.
//! They are removed with the guests; they outlive every process and not the host.

use crate::guest_state;
use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where they are: below `state`, `disks` and `shared`.
pub(crate) const DIRECTORY: &str = "/run/xen-virtiod";

pub(super) struct StateFiles {
    /// Workers write these files, and the supervisor never looks into them: a worker that its guest has taken over
    /// may have written anything there.
    state: PathBuf,
    /// The supervisor's own: what guests have of their devices.
    disks: PathBuf,
    /// … and what their workers share with back-ends.
    shared: PathBuf,
}

/// What a worker shares with a device's back-end, which the next supervisor finds by that among what the worker has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shared {
    /// Inodes: of the connection, and of the memory.
    pub(super) connection: u64,
    pub(super) memory: u64,
}

impl StateFiles {
    /// The files below `directory`, for root only.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let make = |name| -> Result<PathBuf> {
            let directory = directory.join(name);
            let what = || format!("making {}", directory.display());
            fs::create_dir_all(&directory).with_context(what)?;
            fs::set_permissions(&directory, Permissions::from_mode(0o700)).with_context(what)?;
            Ok(directory)
        };
        Ok(Self {
            state: make("state")?,
            disks: make("disks")?,
            shared: make("shared")?,
        })
    }

    fn path(&self, guest: &Identity) -> PathBuf {
        self.state.join(guest.file_name())
    }

    /// What the guest has had of the device `key`, and keeps as long as it lives, whatever its entry and the configuration
    /// say later. None of a guest that an earlier version has served.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(super) fn kept(&self, guest: &Identity, key: EntryKey) -> Result<Option<Value>> {
        Ok(read(&self.disks.join(guest.file_name()))?.remove(&key))
    }

    /// Keeps what the guest has of the device `key`, or forgets it.
    ///
    /// # Errors
    ///
    /// If it cannot be written; what was kept before still is.
    pub(super) fn keep(&self, guest: &Identity, key: EntryKey, kept: Option<Value>) -> Result<()> {
        change(&self.disks.join(guest.file_name()), key, kept)
    }

    /// What the guest's worker shares with the back-end of the device `key`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(super) fn shared(&self, guest: &Identity, key: EntryKey) -> Result<Option<Shared>> {
        Ok(read(&self.shared.join(guest.file_name()))?.remove(&key))
    }

    /// The devices of all guests' whose worker shares something with a back-end, as far as that can be read.
    pub(super) fn sharing(&self) -> Vec<(u16, EntryKey)> {
        let files = fs::read_dir(&self.shared).into_iter().flatten().flatten();
        let mut sharing = Vec::new();
        for file in files {
            let shared = read::<Shared>(&file.path()).unwrap_or_default();
            if let Some(domid) = domid_of(&file.file_name()) {
                sharing.extend(shared.into_keys().map(|key| (domid, key)));
            }
        }
        sharing
    }

    /// The guest's worker shares this with the back-end of the device `key`, or nothing that may be handed on.
    ///
    /// # Errors
    ///
    /// If it cannot be written; then nothing of the guest's is known to be shared.
    pub(super) fn share(
        &self,
        guest: &Identity,
        key: EntryKey,
        shared: Option<Shared>,
    ) -> Result<()> {
        let path = self.shared.join(guest.file_name());
        change(&path, key, shared).inspect_err(|_| drop(fs::remove_file(&path)))
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
                file.set_len(guest_state::file_bytes(0) as u64)?;
            }
            if !guest_state::is_file_length(file.metadata()?.len()) {
                return Err(io::Error::other(
                    "it has a length that no file of this version has: start the one again that made it",
                ));
            }
            Ok(file)
        };
        open().with_context(|| format!("opening the guest's state, {}", path.display()))
    }

    /// Sees to it that there is room for the state of devices that take `devices` bytes ([`guest_state::device_bytes`]): a
    /// worker that found none when it writes, or reads what was never written, would be killed. The bytes that the file
    /// has now.
    pub(super) fn reserve(&self, guest: &Identity, devices: usize) -> Result<usize> {
        let file = self.open(guest)?;
        let before = usize::try_from(file.metadata()?.len())?;
        let bytes = if before == guest_state::FIRST_FORMAT_BYTES {
            before
        } else {
            before.max(guest_state::file_bytes(devices))
        };
        fallocate(&file, FallocateFlags::empty(), 0, bytes as u64).with_context(|| {
            format!(
                "making room for {bytes} bytes in {}",
                self.path(guest).display()
            )
        })?;
        Ok(bytes)
    }

    /// Removes the file of a guest that is gone.
    pub(super) fn remove(&self, guest: &Identity) {
        for directory in [&self.state, &self.disks, &self.shared] {
            let path = directory.join(guest.file_name());
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("{} cannot be removed: {error}", path.display());
            }
        }
    }

    /// Removes the files of guests that are not what `identify` finds behind their domid. Those of a guest that it
    /// cannot tell of stay. The domids of the guests that have been served and live.
    pub(super) fn sweep<E: Display>(
        &self,
        mut identify: impl FnMut(u16) -> Result<Option<Identity>, E>,
    ) -> Result<BTreeSet<u16>> {
        let mut served = BTreeSet::new();
        for directory in [&self.state, &self.disks, &self.shared] {
            for file in fs::read_dir(directory)?.flatten() {
                let name = file.file_name();
                let lives = match domid_of(&name).map(&mut identify) {
                    Some(Ok(lives)) => lives,
                    Some(Err(error)) => {
                        tracing::error!("{} is left as it is: {error}", file.path().display());
                        continue;
                    }
                    None => None,
                };
                match lives.filter(|guest| guest.file_name() == *name.to_string_lossy()) {
                    Some(guest) => drop(served.insert(guest.domid)),
                    None => {
                        tracing::info!("the guest of {} is gone", file.path().display());
                        if let Err(error) = fs::remove_file(file.path()) {
                            tracing::warn!("{} cannot be removed: {error}", file.path().display());
                        }
                    }
                }
            }
        }
        Ok(served)
    }
}

/// The guest that a file is of ([`Identity::file_name`]).
fn domid_of(name: &OsStr) -> Option<u16> {
    name.to_str()?.split_once('-')?.0.parse().ok()
}

/// What the file at `path` has of each device that this version knows.
fn read<T: DeserializeOwned>(path: &Path) -> Result<BTreeMap<EntryKey, T>> {
    let what = || format!("reading {}", path.display());
    let mut known = BTreeMap::new();
    for (key, value) in read_all(path)? {
        // A later version may have other keys; its devices are nobody's here.
        if let Ok(key) = EntryKey::deserialize(key) {
            known.insert(key, T::deserialize(value).with_context(what)?);
        }
    }
    Ok(known)
}

/// What the file at `path` has: nothing, if it is not there.
fn read_all(path: &Path) -> Result<Vec<(Value, Value)>> {
    let what = || format!("reading {}", path.display());
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(what),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(what),
    }
}

/// The file at `path` has `value` of the device `key` from now on, or nothing; it is written anew, if that is news.
fn change(path: &Path, key: EntryKey, value: Option<impl Serialize>) -> Result<()> {
    let key = serde_json::to_value(key)?;
    let value = value.map(serde_json::to_value).transpose()?;
    // What a later version keeps of its devices stays.
    let mut all = read_all(path)?;
    let place = all.iter().position(|(other, _)| *other == key);
    let before = place.map(|place| all.remove(place).1);
    if before == value {
        return Ok(());
    }
    all.extend(value.map(|value| (key, value)));
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(&all)?)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("writing {}", path.display()))
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
            let bytes = files.reserve(guest, 1000).unwrap();
            let len = files.open(guest).unwrap().metadata().unwrap().len();
            assert_eq!(len, bytes as u64);
            assert_eq!(bytes, guest_state::file_bytes(1000));
        }
        assert!(!files.has(&guest(1, "c")));
        // Another guest has domid 2 now, and domid 3 is nobody's.
        let now = |domid| match domid {
            1 => Ok(Some(guest(1, "a-b"))),
            2 => Ok(Some(guest(2, "e"))),
            _ => Ok::<_, io::Error>(None),
        };
        assert_eq!(files.sweep(now).unwrap(), [1].into());
        assert_eq!(
            guests.each_ref().map(|guest| files.has(guest)),
            [true, false, false]
        );
        files.remove(&guests[0]);
        files.remove(&guests[0]);
        assert!(!files.has(&guests[0]));
    }

    #[test]
    fn what_a_guest_has_had_of_its_devices_is_kept_as_long_as_it_lives() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateFiles::new(directory.path()).unwrap();
        let (first, second) = (guest(1, "a"), guest(1, "b"));
        let key = |devid| EntryKey {
            form: crate::toolstack::libxl::EntryForm::Disk,
            devid,
        };
        let binding = |bytes: u64| serde_json::json!({ "bytes": bytes });
        for (devid, bytes) in [(1, 512), (2, 1024), (1, 4096)] {
            files
                .keep(&first, key(devid), Some(binding(bytes)))
                .unwrap();
        }
        let kept = |guest, devid| files.kept(guest, key(devid)).unwrap();
        assert_eq!(kept(&first, 1), Some(binding(4096)));
        assert_eq!(kept(&second, 1), None);
        files.keep(&first, key(1), None).unwrap();
        assert_eq!(
            (kept(&first, 1), kept(&first, 2)),
            (None, Some(binding(1024)))
        );
        files.remove(&first);
        assert_eq!(kept(&first, 2), None);
        // A guest of which nobody can tell whether it lives keeps what it has.
        files.keep(&second, key(1), Some(binding(512))).unwrap();
        files.sweep(|_| Err("xenstored refuses")).unwrap();
        assert_eq!(kept(&second, 1), Some(binding(512)));
        let text = r#"[[{"form":"later","devid":7},1],[{"form":"disk","devid":1},2]]"#;
        fs::write(files.disks.join(second.file_name()), text).unwrap();
        assert_eq!(
            kept(&second, 1),
            Some(2.into()),
            "as before the later version"
        );
        files.keep(&second, key(1), Some(3.into())).unwrap();
        let all = read_all(&files.disks.join(second.file_name())).unwrap();
        let later = serde_json::json!({"form": "later", "devid": 7});
        assert!(all.contains(&(later, 1.into())), "that one finds its own");
        fs::write(files.disks.join(second.file_name()), "[").unwrap();
        assert!(files.kept(&second, key(1)).is_err());
        // What it shares with back-ends is another matter.
        let shared = |connection| Shared {
            connection,
            memory: 2,
        };
        files.share(&second, key(1), Some(shared(7))).unwrap();
        files.share(&second, key(1), Some(shared(8))).unwrap();
        assert_eq!(files.shared(&second, key(1)).unwrap(), Some(shared(8)));
        files.share(&second, key(1), None).unwrap();
        assert_eq!(files.shared(&second, key(1)).unwrap(), None);
    }

    #[test]
    fn a_file_grows_with_what_is_needed_but_for_one_of_the_first_layout() {
        let directory = tempfile::tempdir().unwrap();
        let files = StateFiles::new(directory.path()).unwrap();
        let (new, old) = (guest(1, "a"), guest(2, "b"));
        let lens = [100, 300_000, 100].map(|devices| files.reserve(&new, devices).unwrap());
        assert!(lens[0] < lens[1] && lens[1] == lens[2], "{lens:?}");
        let first = guest_state::FIRST_FORMAT_BYTES;
        let file = File::create(files.path(&old)).unwrap();
        file.set_len(first as u64).unwrap();
        assert_eq!(files.reserve(&old, 2_000_000).unwrap(), first);
        assert_eq!(file.metadata().unwrap().len(), first as u64);
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
