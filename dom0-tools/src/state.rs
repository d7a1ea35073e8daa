//! The state file of one guest: what a worker must find to go on where another was killed.
//!
//! Workers write it and workers read it, through shared memory. The supervisor hands it over and never looks
//! into it: a worker that its guest has taken over may have written anything there.

use crate::libxl::{self, EntryKey};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::rc::Rc;
use xen_virtio_backend::{StateArea, StateCell, StateError};
use xen_virtio_guest_mapping::Permissions;
use xen_virtio_guest_mapping::xen::Mapping;
use xen_virtio_transport::{DeviceState, MmioRange};

/// The file's first word.
const MAGIC: u64 = u64::from_le_bytes(*b"xen-virt");
/// The second: the number of the layout. A program reads this one and all before it.
const FORMAT: u64 = 1;
const MAGIC_WORD: usize = 0;
const FORMAT_WORD: usize = 1;
/// The ioreq server, plus one.
const SERVER_WORD: usize = 2;

/// Bytes before the first slot.
const HEADER: usize = 4096;
/// Devices that there is room for.
const SLOTS: usize = 16;
const _: () = assert!(SLOTS >= libxl::MAX_DEVICES);
/// A slot: which device, the device's own words, its registers and queues.
const NAME: usize = 1024;
const OWN: usize = 4096 - NAME;
/// The last of the device's own words is not its own: earlier versions left it zero.
const SHOWN: usize = 8;
const SLOT: usize = NAME + OWN + DeviceState::BYTES;

/// Bytes of a state file.
pub const BYTES: usize = HEADER + SLOTS * SLOT;

/// Why a guest cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum GuestStateError {
    #[error("the guest's state file cannot be mapped")]
    Map(#[from] io::Error),
    #[error("the guest's state file holds something else (it begins with {0:#x})")]
    Magic(u64),
    #[error(
        "the guest's state file has layout {0}, and this xen-virtiod knows those up to {FORMAT}: start the newer \
         version again"
    )]
    Format(u64),
    #[error("the guest's state file names the ioreq server {0}, which cannot be")]
    Server(u64),
    #[error("the guest's state file is damaged")]
    Damaged(#[from] StateError),
    #[error("the guest's state file does not say which device is which")]
    Name(#[from] serde_json::Error),
    #[error("the guest's state file has no room for another device")]
    Full,
    #[error("the guest's state file has a device at {0:#x}, where none can be")]
    Base(u64),
    #[error(
        "another file or block device is where the guest's disk was: put that back, or destroy and create the guest \
         to have it use the new one"
    )]
    Replaced,
    #[error(
        "nothing is recorded of it, although the guest has had it: destroy and create the guest"
    )]
    Unrecorded,
}

/// Which device a slot is about.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Name {
    key: EntryKey,
    base: u64,
    /// The first version did not record it.
    backing: Option<Backing>,
}

/// The file or block device that a device's contents are in, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    device: u64,
    /// Zero for a block device.
    inode: u64,
}

impl Backing {
    /// That which is open as `file`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn of(file: &File) -> io::Result<Self> {
        let status = file.metadata()?;
        let (device, inode) = if status.file_type().is_block_device() {
            (status.rdev(), 0)
        } else {
            (status.dev(), status.ino())
        };
        Ok(Self { device, inode })
    }
}

/// A guest's state.
pub struct GuestState {
    area: StateArea,
}

/// One device's part of it.
pub struct Slot {
    /// Words that the device itself keeps.
    pub own: StateArea,
    /// A word: the bytes of the disk that the driver was told of, zero if that is not recorded.
    pub shown: StateArea,
    pub device: DeviceState,
}

impl GuestState {
    /// The state in `file`, of [`BYTES`], which may be closed afterwards.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn map(file: &File) -> Result<Self, GuestStateError> {
        let mapping = Mapping::new(file, 0, BYTES, Permissions::ReadWrite)?;
        Self::new(StateArea::new(Rc::new(mapping), BYTES))
    }

    /// The state in `area`, of [`BYTES`]; zeros are that of a guest that nobody has served.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`] if this program cannot go on from it.
    pub fn new(area: StateArea) -> Result<Self, GuestStateError> {
        match (area.load(MAGIC_WORD), area.load(FORMAT_WORD)) {
            (0, _) => {
                area.store(FORMAT_WORD, FORMAT);
                area.store(MAGIC_WORD, MAGIC);
            }
            (MAGIC, 1..=FORMAT) => {}
            (MAGIC, format) => return Err(GuestStateError::Format(format)),
            (other, _) => return Err(GuestStateError::Magic(other)),
        }
        Ok(Self { area })
    }

    /// The guest's ioreq server, if one was made.
    ///
    /// # Errors
    ///
    /// [`GuestStateError::Server`].
    pub fn server(&self) -> Result<Option<u16>, GuestStateError> {
        match self.area.load(SERVER_WORD) {
            0 => Ok(None),
            word => match u16::try_from(word - 1) {
                Ok(server) => Ok(Some(server)),
                Err(_) => Err(GuestStateError::Server(word - 1)),
            },
        }
    }

    pub fn set_server(&self, server: u16) {
        self.area.store(SERVER_WORD, u64::from(server) + 1);
    }

    /// The slot of the device that libxl put at `base`, whose contents are in `backing`: an empty one, if there
    /// is none of it yet, and the guest has not had it (`served`).
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn slot(
        &self,
        key: EntryKey,
        base: u64,
        backing: Backing,
        served: bool,
    ) -> Result<Slot, GuestStateError> {
        let is_it = |name: &Name| name.key == key && name.base == base;
        let name = Name {
            key,
            base,
            backing: Some(backing),
        };
        if let Some((slot, known)) = self.names()?.into_iter().find(|(_, name)| is_it(name)) {
            if known.backing.is_some_and(|known| known != backing) {
                return Err(GuestStateError::Replaced);
            }
            self.rename(slot, &name)?;
            return Ok(self.open(slot));
        }
        if served {
            return Err(GuestStateError::Unrecorded);
        }
        // What was at another address is another device, which the guest cannot have known.
        self.forget(key)?;
        let taken = self.names()?;
        let is_free = |slot: &usize| taken.iter().all(|(other, _)| other != slot);
        let slot = (0..SLOTS).find(is_free).ok_or(GuestStateError::Full)?;
        let empty = self.open(slot);
        empty.own.zero();
        empty.shown.zero();
        empty.device.clear();
        self.rename(slot, &name)?;
        Ok(empty)
    }

    /// Every device that there is a slot of.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn devices(&self) -> Result<Vec<(EntryKey, MmioRange, DeviceState)>, GuestStateError> {
        let device = |(slot, name): (usize, Name)| {
            let range = libxl::page(name.base).ok_or(GuestStateError::Base(name.base))?;
            Ok((name.key, range, self.open(slot).device))
        };
        self.names()?.into_iter().map(device).collect()
    }

    /// The driver of disk `key` has been told of so many bytes.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn set_shown(&self, key: EntryKey, bytes: u64) -> Result<(), GuestStateError> {
        for (slot, name) in self.names()? {
            if name.key == key {
                self.open(slot).shown.store(0, bytes);
            }
        }
        Ok(())
    }

    /// The device is no more.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn forget(&self, key: EntryKey) -> Result<(), GuestStateError> {
        for (slot, name) in self.names()? {
            if name.key == key {
                self.name(slot).clear();
            }
        }
        Ok(())
    }

    /// The slots that are taken.
    fn names(&self) -> Result<Vec<(usize, Name)>, GuestStateError> {
        let mut names = Vec::new();
        for slot in 0..SLOTS {
            let bytes = self.name(slot).load()?;
            if !bytes.is_empty() {
                names.push((slot, serde_json::from_slice(&bytes)?));
            }
        }
        Ok(names)
    }

    fn rename(&self, slot: usize, name: &Name) -> Result<(), GuestStateError> {
        Ok(self.name(slot).store(&serde_json::to_vec(name)?)?)
    }

    fn part(&self, slot: usize, offset: usize, len: usize) -> StateArea {
        self.area.part(HEADER + slot * SLOT + offset, len)
    }

    fn name(&self, slot: usize) -> StateCell {
        StateCell::new(self.part(slot, 0, NAME))
    }

    fn open(&self, slot: usize) -> Slot {
        Slot {
            own: self.part(slot, NAME, OWN - SHOWN),
            shown: self.part(slot, NAME + OWN - SHOWN, SHOWN),
            device: DeviceState::new(&self.part(slot, NAME + OWN, DeviceState::BYTES)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libxl::LibxlForm;

    const BASE: u64 = 0x0200_0000;

    fn key(devid: u32) -> EntryKey {
        EntryKey {
            form: LibxlForm::Disk,
            devid,
        }
    }

    const DISK: Backing = Backing {
        device: 0x801,
        inode: 12,
    };

    fn area() -> StateArea {
        StateArea::private(BYTES).unwrap()
    }

    #[test]
    fn the_next_worker_finds_what_the_last_one_left() {
        let area = area();
        let first = GuestState::new(area.clone()).unwrap();
        assert_eq!(first.server().unwrap(), None);
        first.set_server(0);
        for devid in 0..3 {
            let slot = first
                .slot(key(devid), BASE + u64::from(devid), DISK, false)
                .unwrap();
            slot.own.store(0, 7 + u64::from(devid));
        }
        first.forget(key(1)).unwrap();
        let second = GuestState::new(area).unwrap();
        assert_eq!(second.server().unwrap(), Some(0));
        let slot = second.slot(key(2), BASE + 2, DISK, true).unwrap();
        assert_eq!(slot.own.load(0), 9);
        for (devid, base) in [(1, BASE + 1), (0, BASE + 5)] {
            let slot = second.slot(key(devid), base, DISK, false).unwrap();
            assert_eq!(slot.own.load(0), 0);
        }
    }

    #[test]
    fn a_device_that_the_guest_has_had_is_refused_for_good_if_nothing_is_recorded_of_it() {
        let state = GuestState::new(area()).unwrap();
        for _ in 0..2 {
            let unrecorded = state.slot(key(0), BASE, DISK, true);
            assert!(matches!(unrecorded, Err(GuestStateError::Unrecorded)));
        }
    }

    #[test]
    fn there_is_room_for_every_device_of_a_guest_and_no_more() {
        let state = GuestState::new(area()).unwrap();
        for devid in 0..16 {
            state.slot(key(devid), BASE, DISK, false).unwrap();
        }
        let full = state.slot(key(16), BASE, DISK, false);
        assert!(matches!(full, Err(GuestStateError::Full)));
        state.forget(key(3)).unwrap();
        assert!(state.slot(key(16), BASE, DISK, false).is_ok());
    }

    #[test]
    fn what_is_no_state_of_ours_is_told_apart() {
        let error = |word: usize, value| {
            let area = area();
            drop(GuestState::new(area.clone()).unwrap());
            area.store(word, value);
            GuestState::new(area)
                .and_then(|state| state.server().map(drop))
                .unwrap_err()
                .to_string()
        };
        assert!(error(MAGIC_WORD, 5).contains("0x5"));
        assert!(error(FORMAT_WORD, 0).contains("layout 0"));
        assert!(error(FORMAT_WORD, FORMAT + 1).contains("newer"));
        assert!(error(SERVER_WORD, 1 << 20).contains("ioreq server"));
    }

    #[test]
    fn another_disk_in_a_disks_place_is_refused() {
        let state = GuestState::new(area()).unwrap();
        state.slot(key(0), BASE, DISK, false).unwrap();
        let other = Backing { inode: 13, ..DISK };
        let replaced = state.slot(key(0), BASE, other, true);
        assert!(matches!(replaced, Err(GuestStateError::Replaced)));
        assert!(state.slot(key(0), BASE, DISK, true).is_ok());
        // Another device has another disk.
        assert!(state.slot(key(0), BASE + 0x200, other, false).is_ok());
    }

    #[test]
    fn names_of_the_first_version_are_understood_and_their_disk_is_recorded() {
        let state = GuestState::new(area()).unwrap();
        let first = br#"{"key":{"form":"disk","devid":0},"base":33554432}"#;
        state.name(0).store(first).unwrap();
        assert!(state.slot(key(0), BASE, DISK, true).is_ok());
        let other = Backing { inode: 13, ..DISK };
        let replaced = state.slot(key(0), BASE, other, true);
        assert!(matches!(replaced, Err(GuestStateError::Replaced)));
    }

    #[test]
    fn a_file_keeps_its_identity_over_its_paths() {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        let first = Backing::of(&File::create(&a).unwrap()).unwrap();
        std::fs::rename(&a, &b).unwrap();
        let second = Backing::of(&File::create(&a).unwrap()).unwrap();
        assert_ne!(first, second);
        assert_eq!(Backing::of(&File::open(&b).unwrap()).unwrap(), first);
    }

    #[test]
    fn a_name_that_is_none_is_an_error() {
        let state = GuestState::new(area()).unwrap();
        state.name(4).store(b"{\"key\":7}").unwrap();
        assert!(matches!(
            state.slot(key(0), BASE, DISK, false),
            Err(GuestStateError::Name(_))
        ));
        state.part(4, 0, NAME).store(0, u64::MAX);
        assert!(matches!(
            state.slot(key(0), BASE, DISK, false),
            Err(GuestStateError::Damaged(_))
        ));
    }
}
