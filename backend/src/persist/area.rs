//! Words in memory that outlives the process.

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::xen::Mapping;

/// Bytes of the words that [`StateArea`] loads and stores.
pub(crate) const WORD: usize = size_of::<u64>();

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

    /// `len` bytes of the area, from byte `offset`.
    ///
    /// # Panics
    ///
    /// If they lie outside the area.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        assert!(offset + len <= self.len);
        self.memory.slice(self.start + offset, len)
    }
}

fn atomic<'a>(word: &'a VolatileSlice<'_>) -> &'a AtomicU64 {
    word.get_atomic_ref(0).expect("aligned words")
}
