//! Bytes that are replaced as a whole.

use super::area::{StateArea, WORD};
use vm_memory::{Bytes, VolatileSlice};

/// Bytes that are replaced as a whole: they are the old or the new ones, wherever the writer died.
#[derive(Clone)]
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
    /// The cell in `area`, of at least one word; zeros are an empty one.
    pub fn new(area: StateArea) -> Self {
        Self { area }
    }

    /// Bytes of an area whose cell has room for `capacity` bytes.
    pub const fn bytes(capacity: usize) -> usize {
        WORD + 2 * capacity
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
