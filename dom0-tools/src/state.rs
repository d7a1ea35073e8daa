//! The state file of one guest: what a worker must find to go on where another was killed.
//!
//! Workers write it and workers read it, through shared memory. The supervisor hands it over and never looks
//! into it: a worker that its guest has taken over may have written anything there.

use crate::libxl::EntryKey;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::rc::Rc;
use xen_virtio_backend::{StateArea, StateCell, StateError};
use xen_virtio_guest_mapping::Permissions;
use xen_virtio_guest_mapping::xen::Mapping;
use xen_virtio_transport::DeviceState;

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
/// Devices that there is room for: libxl has addresses for eleven.
const SLOTS: usize = 16;
/// A slot: which device, the device's own words, its registers and queues.
const NAME: usize = 1024;
const OWN: usize = 4096 - NAME;
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
}

/// Which device a slot is about.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Name {
    key: EntryKey,
    base: u64,
}

/// A guest's state.
pub struct GuestState {
    area: StateArea,
}

/// One device's part of it.
pub struct Slot {
    /// Words that the device itself keeps.
    pub own: StateArea,
    pub device: DeviceState,
    /// An earlier worker had this device.
    pub is_known: bool,
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

    /// The slot of the device that libxl put at `base`: an empty one, if there is none of it yet.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn slot(&self, key: EntryKey, base: u64) -> Result<Slot, GuestStateError> {
        let name = Name { key, base };
        if let Some(slot) = self.find(|other| *other == Some(&name))? {
            return Ok(self.open(slot, true));
        }
        // What was at another address is another device, which the guest cannot have known.
        self.forget(key)?;
        let slot = self.find(|name| name.is_none())?;
        let slot = slot.ok_or(GuestStateError::Full)?;
        let empty = self.open(slot, false);
        empty.own.zero();
        empty.device.clear();
        self.name(slot).store(&serde_json::to_vec(&name)?)?;
        Ok(empty)
    }

    /// The device is no more.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn forget(&self, key: EntryKey) -> Result<(), GuestStateError> {
        if let Some(slot) = self.find(|name| name.is_some_and(|name| name.key == key))? {
            self.name(slot).clear();
        }
        Ok(())
    }

    fn find(
        &self,
        wanted: impl Fn(&Option<&Name>) -> bool,
    ) -> Result<Option<usize>, GuestStateError> {
        for slot in 0..SLOTS {
            let bytes = self.name(slot).load()?;
            let name: Option<Name> = if bytes.is_empty() {
                None
            } else {
                Some(serde_json::from_slice(&bytes)?)
            };
            if wanted(&name.as_ref()) {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    fn part(&self, slot: usize, offset: usize, len: usize) -> StateArea {
        self.area.part(HEADER + slot * SLOT + offset, len)
    }

    fn name(&self, slot: usize) -> StateCell {
        StateCell::new(self.part(slot, 0, NAME))
    }

    fn open(&self, slot: usize, is_known: bool) -> Slot {
        Slot {
            own: self.part(slot, NAME, OWN),
            device: DeviceState::new(&self.part(slot, NAME + OWN, DeviceState::BYTES)),
            is_known,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libxl::Form;

    const BASE: u64 = 0x0200_0000;

    fn key(devid: u32) -> EntryKey {
        EntryKey {
            form: Form::Disk,
            devid,
        }
    }

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
            let slot = first.slot(key(devid), BASE + u64::from(devid)).unwrap();
            assert!(!slot.is_known);
            slot.own.store(0, 7 + u64::from(devid));
        }
        first.forget(key(1)).unwrap();
        let second = GuestState::new(area).unwrap();
        assert_eq!(second.server().unwrap(), Some(0));
        let slot = second.slot(key(2), BASE + 2).unwrap();
        assert_eq!((slot.is_known, slot.own.load(0)), (true, 9));
        let slot = second.slot(key(1), BASE + 1).unwrap();
        assert_eq!((slot.is_known, slot.own.load(0)), (false, 0));
        let slot = second.slot(key(0), BASE + 5).unwrap();
        assert_eq!((slot.is_known, slot.own.load(0)), (false, 0));
    }

    #[test]
    fn there_is_room_for_every_device_of_a_guest_and_no_more() {
        let state = GuestState::new(area()).unwrap();
        for devid in 0..16 {
            state.slot(key(devid), BASE).unwrap();
        }
        let full = state.slot(key(16), BASE);
        assert!(matches!(full, Err(GuestStateError::Full)));
        state.forget(key(3)).unwrap();
        assert!(state.slot(key(16), BASE).is_ok());
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
    fn a_name_that_is_none_is_an_error() {
        let state = GuestState::new(area()).unwrap();
        state.name(4).store(b"{\"key\":7}").unwrap();
        assert!(matches!(
            state.slot(key(0), BASE),
            Err(GuestStateError::Name(_))
        ));
        state.part(4, 0, NAME).store(0, u64::MAX);
        assert!(matches!(
            state.slot(key(0), BASE),
            Err(GuestStateError::Damaged(_))
        ));
    }
}
