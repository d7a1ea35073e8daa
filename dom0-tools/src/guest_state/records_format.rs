//! The layout of this version: [`Records`] of each device, as many and as large as it keeps.

use super::{GuestStateError, HEADER, Layout, Name, Place};
use crate::toolstack::libxl::{EntryForm, EntryKey};
use serde::Deserialize;
use serde_json::Value;
use xen_virtio_backend::{QueueJournal, RecordKey, RecordKind, Records, StateArea, StateCell};
use xen_virtio_transport::DeviceState;

/// Records that a new file has room for: sixteen devices of thirty.
pub(super) const ENTRIES: usize = 480;
/// Bytes of a device's name.
const NAME: usize = 256;

pub(super) struct RecordsFormat {
    records: Records,
}

/// Bytes that the records of a device take, of which each of `own` is one.
pub(super) fn device_bytes(own: &[usize], queue_sizes: &[u16]) -> usize {
    let registers = DeviceState::registers_bytes(queue_sizes.len());
    let cells = [NAME, registers].map(StateCell::bytes).into_iter();
    let journals = queue_sizes.iter().map(|size| QueueJournal::bytes(*size));
    cells
        .chain(journals)
        .chain(own.iter().copied())
        .map(Records::bytes)
        .sum()
}

/// Bytes of a file with room for `devices` bytes of records.
pub(super) fn file_bytes(devices: usize) -> usize {
    HEADER + Records::directory_bytes(ENTRIES) + devices
}

impl RecordsFormat {
    /// The records in `area`, of a file of `bytes`, with a directory of `entries`.
    pub(super) fn new(
        area: &StateArea,
        entries: usize,
        bytes: usize,
    ) -> Result<Self, GuestStateError> {
        let room = bytes.min(area.len()).saturating_sub(HEADER);
        if entries > ENTRIES << 8 || Records::directory_bytes(entries) > room {
            return Err(GuestStateError::Directory(entries));
        }
        let area = area.part(HEADER, area.len() - HEADER);
        Ok(Self {
            records: Records::new(area, entries, room),
        })
    }
}

/// Whether this is the name of a device of a form that a later version has.
fn is_of_later_form(name: &[u8]) -> bool {
    let name: Option<Value> = serde_json::from_slice(name).ok();
    let form = name.and_then(|name| name.get("key")?.get("form").cloned());
    form.is_some_and(|form| form.is_string() && EntryForm::deserialize(form).is_err())
}

fn key(Place(owner): Place, kind: RecordKind, index: u16) -> RecordKey {
    RecordKey { owner, kind, index }
}

impl Layout for RecordsFormat {
    fn names(&self) -> Result<Vec<(Place, Name)>, GuestStateError> {
        let mut names = Vec::new();
        for owner in self.records.owners(RecordKind::Identity) {
            let place = Place(owner);
            let cell = self
                .records
                .find_cell(key(place, RecordKind::Identity, 0))?;
            let bytes = cell.map(|cell| cell.load()).transpose()?;
            if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) {
                match serde_json::from_slice(&bytes) {
                    Ok(name) => names.push((place, name)),
                    // Its service is not there, and the guest's other devices are.
                    Err(_) if is_of_later_form(&bytes) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(names)
    }

    fn add(&self, entry: EntryKey) -> Result<Place, GuestStateError> {
        let place = Place(entry.number());
        self.records.remove(place.0);
        self.records.sweep();
        Ok(place)
    }

    fn set_name(&self, place: Place, name: &[u8]) -> Result<(), GuestStateError> {
        let identity = key(place, RecordKind::Identity, 0);
        Ok(self.records.open_cell(identity, NAME)?.store(name)?)
    }

    fn remove(&self, place: Place) {
        self.records.remove(place.0);
    }

    fn own(&self, place: Place, index: u16, len: usize) -> Result<StateArea, GuestStateError> {
        Ok(self.records.open(key(place, RecordKind::Own, index), len)?)
    }

    fn registers(&self, place: Place, capacity: usize) -> Result<StateCell, GuestStateError> {
        let registers = key(place, RecordKind::Registers, 0);
        Ok(self.records.open_cell(registers, capacity)?)
    }

    fn journal(&self, place: Place, queue: u16, size: u16) -> Result<StateArea, GuestStateError> {
        let journal = key(place, RecordKind::Journal, queue);
        Ok(self.records.open(journal, QueueJournal::bytes(size))?)
    }

    fn grow(&self, bytes: usize) {
        self.records.grow(bytes.saturating_sub(HEADER));
    }
}
