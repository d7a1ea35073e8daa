//! The first layout: sixteen slots of one size. Guests that began with it keep it, so that the version which made it can
//! serve them again.

use super::{GuestStateError, HEADER, Layout, Name, Place};
use crate::toolstack::libxl::{self, EntryKey};
use xen_virtio_backend::{QueueJournal, StateArea, StateCell};

const SLOTS: usize = 16;
const _: () = assert!(SLOTS >= libxl::MAX_DEVICES);

/// A slot: which device, its own words, its registers and queues.
const NAME: usize = 1024;
const OWN: usize = 3072;
/// The last of the device's own words is a second record.
const SECOND: usize = 8;
const REGISTERS: usize = 4096;
const JOURNAL: usize = 12288;
const JOURNALS: usize = 4;
const SLOT: usize = NAME + OWN + REGISTERS + JOURNALS * JOURNAL;

/// Bytes of a file of this layout.
pub(super) const BYTES: usize = HEADER + SLOTS * SLOT;

pub(super) struct FirstFormat {
    area: StateArea,
}

impl FirstFormat {
    /// The slots in `area`, of [`BYTES`].
    pub(super) fn new(area: StateArea) -> Self {
        Self { area }
    }

    fn part(&self, slot: Place, offset: usize, len: usize) -> StateArea {
        let slot = usize::try_from(slot.0).expect("one of the slots");
        self.area.part(HEADER + slot * SLOT + offset, len)
    }

    fn name(&self, slot: Place) -> StateCell {
        StateCell::new(self.part(slot, 0, NAME))
    }

    fn slots() -> impl Iterator<Item = Place> {
        (0..SLOTS as u64).map(Place)
    }
}

impl Layout for FirstFormat {
    fn names(&self) -> Result<Vec<(Place, Name)>, GuestStateError> {
        let mut names = Vec::new();
        for slot in Self::slots() {
            let bytes = self.name(slot).load()?;
            if !bytes.is_empty() {
                names.push((slot, serde_json::from_slice(&bytes)?));
            }
        }
        Ok(names)
    }

    fn add(&self, _key: EntryKey) -> Result<Place, GuestStateError> {
        let taken = self.names()?;
        let is_free = |slot: &Place| taken.iter().all(|(other, _)| other != slot);
        let slot = Self::slots().find(is_free).ok_or(GuestStateError::Full)?;
        self.part(slot, NAME, OWN).zero();
        StateCell::new(self.part(slot, NAME + OWN, REGISTERS)).clear();
        Ok(slot)
    }

    fn set_name(&self, slot: Place, name: &[u8]) -> Result<(), GuestStateError> {
        Ok(self.name(slot).store(name)?)
    }

    fn remove(&self, slot: Place) {
        self.name(slot).clear();
    }

    fn own(&self, slot: Place, index: u16, len: usize) -> Result<StateArea, GuestStateError> {
        let (offset, most) = match index {
            0 => (0, OWN - SECOND),
            1 => (OWN - SECOND, SECOND),
            _ => (0, 0),
        };
        if len > most {
            return Err(GuestStateError::FirstFormat);
        }
        Ok(self.part(slot, NAME + offset, most))
    }

    fn registers(&self, slot: Place, capacity: usize) -> Result<StateCell, GuestStateError> {
        if StateCell::bytes(capacity) > REGISTERS {
            return Err(GuestStateError::FirstFormat);
        }
        let area = self.part(slot, NAME + OWN, REGISTERS);
        Ok(StateCell::new(area))
    }

    fn journal(&self, slot: Place, queue: u16, size: u16) -> Result<StateArea, GuestStateError> {
        let queue = usize::from(queue);
        if queue >= JOURNALS || QueueJournal::bytes(size) > JOURNAL {
            return Err(GuestStateError::FirstFormat);
        }
        let offset = NAME + OWN + REGISTERS + queue * JOURNAL;
        Ok(self.part(slot, offset, JOURNAL))
    }

    fn grow(&self, _bytes: usize) {}
}
