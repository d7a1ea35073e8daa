//! Records of any size, found by their keys: a directory, and the room behind it.
//!
//! A later version may keep more of a device than an earlier one, and other things. A record that is too small for it is
//! moved to a larger place; a record that it does not know stays as it is. The room may grow at its end.

use super::area::{StateArea, WORD};
use super::cell::{StateCell, StateError};
use std::cell::Cell;
use std::ops::Range;

/// Bytes of an entry of the directory: a word that says what the record is, zero for none, and one that says where it is,
/// zero in an entry that no record has had, behind which there are none.
const ENTRY: usize = 2 * WORD;
/// Records begin at multiples of it: no two of them share a line of the processor's cache.
const ALIGNMENT: usize = 64;

const OWNER_BITS: u32 = 40;
const INDEX_BITS: u32 = 16;

/// What a record is about. The numbers are those of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKind {
    /// A cell: which device it is. A device has records as long as it has this one.
    Identity = 1,
    /// A cell: the state of the device behind its registers.
    Registers = 2,
    /// The journal of the queue `index`.
    Journal = 3,
    /// Words of the device's own.
    Own = 4,
}

/// Names a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordKey {
    /// The device: 40 bits.
    pub owner: u64,
    pub kind: RecordKind,
    /// Tells apart the records of one kind that a device has.
    pub index: u16,
}

impl RecordKey {
    fn word(self) -> u64 {
        debug_assert!(self.owner >> OWNER_BITS == 0);
        (self.kind as u64) << (OWNER_BITS + INDEX_BITS)
            | u64::from(self.index) << OWNER_BITS
            | self.owner
    }
}

fn owner_of(word: u64) -> u64 {
    word & ((1 << OWNER_BITS) - 1)
}

/// Why there is no such record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("no room is left for a record of {0} bytes")]
    Room(usize),
    #[error("the directory of {0} records is full")]
    Directory(usize),
    #[error("the record {key:#x} lies at {start:#x}+{len:#x}, outside the {room:#x} bytes")]
    Outside {
        key: u64,
        start: usize,
        len: usize,
        room: usize,
    },
    #[error(transparent)]
    Cell(#[from] StateError),
}

/// The records in a [`StateArea`].
pub struct Records {
    area: StateArea,
    /// Entries of the directory, which is at the beginning of the area.
    entries: usize,
    /// Bytes of the area that there is memory for.
    room: Cell<usize>,
}

impl Records {
    /// The records in the first `room` bytes of `area`, with a directory of `entries`; zeros are none.
    ///
    /// # Panics
    ///
    /// If the directory is larger than `room`, or `room` than the area.
    pub fn new(area: StateArea, entries: usize, room: usize) -> Self {
        assert!(Self::directory_bytes(entries) <= room && room <= area.len());
        Self {
            area,
            entries,
            room: Cell::new(room),
        }
    }

    /// Bytes of a directory of `entries`.
    pub const fn directory_bytes(entries: usize) -> usize {
        (entries * ENTRY).next_multiple_of(ALIGNMENT)
    }

    /// Bytes that a record of `len` takes.
    pub const fn bytes(len: usize) -> usize {
        len.next_multiple_of(ALIGNMENT)
    }

    /// There is memory for `room` bytes of the area now.
    pub fn grow(&self, room: usize) {
        self.room
            .set(room.min(self.area.len()).max(self.room.get()));
    }

    /// Who has a record of this kind.
    pub fn owners(&self, kind: RecordKind) -> Vec<u64> {
        let kind_of = |word: u64| word >> (OWNER_BITS + INDEX_BITS);
        let words = self.taken().map(|(_, word)| word);
        let of_kind = words.filter(|word| kind_of(*word) == kind as u64);
        of_kind.map(owner_of).collect()
    }

    /// The record of this name, if there is one: as long as it was made.
    ///
    /// # Errors
    ///
    /// [`RecordError::Outside`].
    pub fn find(&self, key: RecordKey) -> Result<Option<StateArea>, RecordError> {
        let entry = self.entry(key);
        entry.map(|entry| self.place(entry)).transpose()
    }

    /// As [`Records::find`], of a cell.
    ///
    /// # Errors
    ///
    /// [`RecordError::Outside`].
    pub fn find_cell(&self, key: RecordKey) -> Result<Option<StateCell>, RecordError> {
        Ok(self.find(key)?.map(StateCell::new))
    }

    /// The record of this name, of at least `len` bytes. What there is of it stays, at its beginning; what is new is
    /// zero.
    ///
    /// # Errors
    ///
    /// [`RecordError`], with nothing changed.
    pub fn open(&self, key: RecordKey, len: usize) -> Result<StateArea, RecordError> {
        self.open_with(key, len, |old, new| {
            for word in 0..old.len() / WORD {
                new.store(word, old.load(word));
            }
            Ok(())
        })
    }

    /// The cell of this name, with room for at least `capacity` bytes.
    ///
    /// # Errors
    ///
    /// [`RecordError`], with nothing changed.
    pub fn open_cell(&self, key: RecordKey, capacity: usize) -> Result<StateCell, RecordError> {
        let len = StateCell::bytes(capacity);
        let area = self.open_with(key, len, |old, new| {
            let bytes = StateCell::new(old.clone()).load()?;
            Ok(StateCell::new(new.clone()).store(&bytes)?)
        })?;
        Ok(StateCell::new(area))
    }

    fn open_with(
        &self,
        key: RecordKey,
        len: usize,
        copy: impl FnOnce(&StateArea, &StateArea) -> Result<(), RecordError>,
    ) -> Result<StateArea, RecordError> {
        let known = self.entry(key);
        let old = known.map(|entry| self.place(entry)).transpose()?;
        if let Some(old) = &old
            && old.len() >= len
        {
            return Ok(old.clone());
        }
        let vacant = || (0..self.entries).find(|entry| self.word(*entry) == 0);
        let entry = known
            .or_else(vacant)
            .ok_or(RecordError::Directory(self.entries))?;
        let start = self.free(len)?;
        let new = self.area.part(start, len);
        new.zero();
        if let Some(old) = old {
            copy(&old, &new)?;
        }
        // One word takes a known record to its new place, and one word makes a new record known.
        self.area
            .store(2 * entry + 1, (start as u64) << 32 | len as u64);
        self.area.store(2 * entry, key.word());
        Ok(new)
    }

    /// Removes every record of `owner`, its identity first: what a death leaves of it is nobody's.
    pub fn remove(&self, owner: u64) {
        let mut entries: Vec<_> = self
            .taken()
            .filter(|(_, word)| owner_of(*word) == owner)
            .collect();
        entries.sort_unstable_by_key(|(_, word)| *word);
        for (entry, _) in entries {
            self.area.store(2 * entry, 0);
        }
    }

    /// Removes the records of owners that have no identity.
    pub fn sweep(&self) {
        let known = self.owners(RecordKind::Identity);
        for (_, word) in self.taken().collect::<Vec<_>>() {
            if !known.contains(&owner_of(word)) {
                self.remove(owner_of(word));
            }
        }
    }

    /// What the record of an entry is.
    fn word(&self, entry: usize) -> u64 {
        self.area.load(2 * entry)
    }

    /// Where it is.
    fn location(&self, entry: usize) -> u64 {
        self.area.load(2 * entry + 1)
    }

    /// The entries that are taken, with their keys' words.
    fn taken(&self) -> impl Iterator<Item = (usize, u64)> {
        let used = (0..self.entries).take_while(|entry| self.location(*entry) != 0);
        let entries = used.map(|entry| (entry, self.word(entry)));
        entries.filter(|(_, word)| *word != 0)
    }

    fn entry(&self, key: RecordKey) -> Option<usize> {
        let mut taken = self.taken();
        Some(taken.find(|(_, word)| *word == key.word())?.0)
    }

    /// Where the record of a taken entry lies.
    fn range(&self, entry: usize) -> Result<Range<usize>, RecordError> {
        let word = self.location(entry);
        let part = |word: u64| usize::try_from(word & u64::from(u32::MAX)).unwrap_or(usize::MAX);
        let (start, len) = (part(word >> 32), part(word));
        let room = self.room.get();
        let end = start.checked_add(len).filter(|end| *end <= room);
        let fits = start >= Self::directory_bytes(self.entries)
            && start.is_multiple_of(ALIGNMENT)
            && len >= WORD;
        match end.filter(|_| fits) {
            Some(end) => Ok(start..end),
            None => Err(RecordError::Outside {
                key: self.word(entry),
                start,
                len,
                room,
            }),
        }
    }

    fn place(&self, entry: usize) -> Result<StateArea, RecordError> {
        let range = self.range(entry)?;
        Ok(self.area.part(range.start, range.len()))
    }

    /// Where `len` bytes fit between the records that there are.
    fn free(&self, len: usize) -> Result<usize, RecordError> {
        let mut ranges = Vec::new();
        for (entry, _) in self.taken() {
            ranges.push(self.range(entry)?);
        }
        ranges.sort_unstable_by_key(|range| range.start);
        let mut start = Self::directory_bytes(self.entries);
        for range in ranges {
            if range.start >= start + len {
                break;
            }
            start = start.max(range.end.next_multiple_of(ALIGNMENT));
        }
        let end = start.checked_add(len);
        end.filter(|end| *end <= self.room.get())
            .map(|_| start)
            .ok_or(RecordError::Room(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: usize = 8;
    const HEAP: usize = Records::directory_bytes(ENTRIES);

    fn own(owner: u64) -> RecordKey {
        RecordKey {
            owner,
            kind: RecordKind::Own,
            index: 0,
        }
    }

    fn identity(owner: u64) -> RecordKey {
        RecordKey {
            kind: RecordKind::Identity,
            ..own(owner)
        }
    }

    fn records(room: usize) -> (StateArea, Records) {
        let area = StateArea::private(1 << 16).unwrap();
        (area.clone(), Records::new(area, ENTRIES, room))
    }

    #[test]
    fn the_next_process_finds_records_as_they_were_made() {
        let (area, first) = records(HEAP + 1024);
        for owner in 1..=3 {
            first.open(own(owner), 16).unwrap().store(1, 7 * owner);
        }
        let next = Records::new(area, ENTRIES, HEAP + 1024);
        for owner in 1..=3 {
            let found = next.find(own(owner)).unwrap().unwrap();
            assert_eq!((found.len(), found.load(1)), (16, 7 * owner));
        }
        assert!(next.find(own(4)).unwrap().is_none());
        assert_eq!(next.owners(RecordKind::Own), [1, 2, 3]);
        assert!(next.owners(RecordKind::Identity).is_empty());
    }

    #[test]
    fn a_larger_need_makes_a_larger_record_with_what_was_there() {
        let (_, records) = records(HEAP + 1024);
        records.open(own(1), 16).unwrap().store(1, 5);
        records.open(own(2), 16).unwrap().store(0, 6);
        let larger = records.open(own(1), 256).unwrap();
        assert_eq!((larger.len(), larger.load(1), larger.load(2)), (256, 5, 0));
        assert_eq!(records.find(own(2)).unwrap().unwrap().load(0), 6);
        // A version that needs less has the whole of it.
        assert_eq!(records.open(own(1), 8).unwrap().len(), 256);
        let cell = RecordKey {
            kind: RecordKind::Registers,
            ..own(1)
        };
        for text in [b"first".as_slice(), b"other"] {
            records.open_cell(cell, 8).unwrap().store(text).unwrap();
        }
        let larger = records.open_cell(cell, 40).unwrap();
        assert_eq!(larger.load().unwrap(), b"other");
        larger.store(&[1; 40]).unwrap();
    }

    #[test]
    fn room_is_used_again_and_may_grow() {
        let (_, records) = records(HEAP + 192);
        for owner in 1..=3 {
            records.open(own(owner), 64).unwrap();
        }
        assert!(matches!(
            records.open(own(4), 64),
            Err(RecordError::Room(64))
        ));
        records.remove(2);
        records.open(own(4), 64).unwrap().store(7, 1);
        assert!(matches!(
            records.open(own(1), 65),
            Err(RecordError::Room(65))
        ));
        records.grow(HEAP + 512);
        records.open(own(1), 128).unwrap();
        // What was in the place before is gone.
        records.remove(4);
        assert_eq!(records.open(own(5), 64).unwrap().load(7), 0);
    }

    #[test]
    fn more_records_than_the_directory_has_are_refused() {
        let (_, records) = records(1 << 16);
        for owner in 1..=ENTRIES as u64 {
            records.open(own(owner), 8).unwrap();
        }
        assert!(matches!(
            records.open(own(0), 8),
            Err(RecordError::Directory(ENTRIES))
        ));
    }

    #[test]
    fn records_whose_owner_has_no_identity_are_swept() {
        let (area, records) = records(1 << 16);
        for owner in [1, 2] {
            for key in [identity(owner), own(owner)] {
                records.open(key, 8).unwrap();
            }
        }
        // As far as a removal had got.
        area.store(2 * records.entry(identity(1)).unwrap(), 0);
        records.sweep();
        assert!(records.find(own(1)).unwrap().is_none());
        assert!(records.find(own(2)).unwrap().is_some());
    }

    #[test]
    fn a_record_that_lies_nowhere_is_an_error() {
        let (area, records) = records(HEAP + 1024);
        records.open(own(1), 64).unwrap();
        for (start, len) in [
            (0, 64),
            (HEAP, 0),
            (HEAP + 8, 64),
            (HEAP + 1024, 64),
            (HEAP + 960, 65),
            (u32::MAX as usize, u32::MAX as usize),
        ] {
            area.store(1, (start as u64) << 32 | len as u64);
            assert!(records.find(own(1)).is_err(), "{start:#x}+{len:#x}");
            assert!(records.open(own(2), 8).is_err());
        }
    }
}
