//! Memory that outlives the process, so that the next one goes on where this one was killed.
//!
//! A process can die between any two instructions. What it has stored by then stays, in program order; so
//! every update here becomes true by the store of one word.

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::xen::Mapping;

/// Bytes of the words that [`StateArea`] loads and stores.
const WORD: usize = size_of::<u64>();

/// Memory of which somebody else may keep hold when this process ends.
pub trait StateMemory {
    /// `len` bytes from byte `offset`.
    ///
    /// # Panics
    ///
    /// If they lie outside the memory: state has a fixed layout.
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_>;
}

impl StateMemory for Mapping {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        Self::slice(self, offset, len)
    }
}

impl StateMemory for MmapRegion<()> {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.get_slice(offset, len).expect("within the state")
    }
}

/// A part of a [`StateMemory`]. Clones are the same part.
#[derive(Clone)]
pub struct StateArea {
    memory: Rc<dyn StateMemory>,
    start: usize,
    len: usize,
}

impl StateArea {
    /// The first `len` bytes of `memory`.
    pub fn new(memory: Rc<dyn StateMemory>, len: usize) -> Self {
        Self {
            memory,
            start: 0,
            len,
        }
    }

    /// `len` bytes of zeros that nobody else knows: what is in them dies with this process.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn private(len: usize) -> io::Result<Self> {
        let memory = MmapRegion::<()>::new(len).map_err(io::Error::other)?;
        Ok(Self::new(Rc::new(memory), len))
    }

    /// `len` bytes of this area, from byte `offset`, a multiple of eight.
    ///
    /// # Panics
    ///
    /// If they lie outside the area.
    pub fn part(&self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= self.len && offset.is_multiple_of(WORD));
        Self {
            memory: Rc::clone(&self.memory),
            start: self.start + offset,
            len,
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The word number `index` of the area.
    ///
    /// # Panics
    ///
    /// If the area has not that many.
    pub fn load(&self, index: usize) -> u64 {
        let word = self.slice(index * WORD, WORD);
        atomic(&word).load(Ordering::Acquire)
    }

    /// Everything that was stored before is there when this is.
    ///
    /// # Panics
    ///
    /// As [`StateArea::load`].
    pub fn store(&self, index: usize, value: u64) {
        let word = self.slice(index * WORD, WORD);
        atomic(&word).store(value, Ordering::Release);
    }

    /// Sets every whole word to zero.
    pub fn zero(&self) {
        for index in 0..self.len / WORD {
            self.store(index, 0);
        }
    }

    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        assert!(offset + len <= self.len);
        self.memory.slice(self.start + offset, len)
    }
}

fn atomic<'a>(word: &'a VolatileSlice<'_>) -> &'a AtomicU64 {
    word.get_atomic_ref(0).expect("aligned words")
}

/// Bytes that are replaced as a whole: they are the old or the new ones, wherever the writer died.
pub struct StateCell {
    /// A word that says which half holds the bytes, and how many; then the halves.
    area: StateArea,
}

/// What a [`StateCell`] says of itself cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{len} bytes of state in {capacity} bytes of room")]
pub struct StateError {
    pub len: usize,
    pub capacity: usize,
}

impl StateCell {
    pub fn new(area: StateArea) -> Self {
        Self { area }
    }

    fn capacity(&self) -> usize {
        (self.area.len() - WORD) / 2
    }

    /// What was stored last; nothing if nothing was.
    ///
    /// # Errors
    ///
    /// [`StateError`] if this is no cell.
    pub fn load(&self) -> Result<Vec<u8>, StateError> {
        let (len, half) = self.current();
        self.check(len)?;
        let mut bytes = vec![0; len];
        self.half(half, len).copy_to(&mut bytes[..]);
        Ok(bytes)
    }

    /// # Errors
    ///
    /// [`StateError`] for more bytes than fit.
    pub fn store(&self, bytes: &[u8]) -> Result<(), StateError> {
        self.check(bytes.len())?;
        let other = 1 - self.current().1;
        self.half(other, bytes.len())
            .write_slice(bytes, 0)
            .expect("as many bytes as the slice has");
        self.area.store(0, (bytes.len() as u64) << 1 | other as u64);
        Ok(())
    }

    /// Forgets what was stored.
    pub fn clear(&self) {
        self.area.store(0, 0);
    }

    /// How many bytes there are, and in which half.
    fn current(&self) -> (usize, usize) {
        let word = self.area.load(0);
        let len = usize::try_from(word >> 1).unwrap_or(usize::MAX);
        (len, usize::from(word & 1 != 0))
    }

    fn check(&self, len: usize) -> Result<(), StateError> {
        let capacity = self.capacity();
        if len > capacity {
            return Err(StateError { len, capacity });
        }
        Ok(())
    }

    fn half(&self, half: usize, len: usize) -> VolatileSlice<'_> {
        self.area.slice(WORD + half * self.capacity(), len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_holds_what_was_stored_last() {
        let area = StateArea::private(4096).unwrap();
        let cell = StateCell::new(area.part(1024, 72));
        assert_eq!(cell.load().unwrap(), b"");
        cell.store(b"first").unwrap();
        cell.store(b"").unwrap();
        cell.store(b"the second").unwrap();
        assert_eq!(cell.load().unwrap(), b"the second");
        assert!(cell.store(&[0; 33]).is_err());
        assert_eq!(cell.load().unwrap(), b"the second");
        cell.store(&[7; 32]).unwrap();
        assert_eq!(cell.load().unwrap(), [7; 32]);
        assert_eq!((area.load(127), area.load(128 + 9)), (0, 0));
    }

    #[test]
    fn a_cell_that_says_nonsense_is_an_error() {
        let area = StateArea::private(4096).unwrap();
        area.store(0, u64::MAX);
        assert!(StateCell::new(area).load().is_err());
    }
}
