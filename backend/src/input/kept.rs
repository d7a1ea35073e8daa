//! What the next process must know: what the driver has selected, and which keys it takes for pressed.

use super::event::KEYS;
use crate::persist::StateCell;
use std::collections::BTreeSet;
use std::io;

pub(super) struct Kept {
    cell: StateCell,
    /// `select` and `subsel` of the configuration space.
    selected: [u8; 2],
    /// Keys of which the guest was told that they are pressed, and may not know yet that they are so no more.
    pressed: BTreeSet<u16>,
}

impl Kept {
    /// Bytes of the cell: what is selected, and a bit a key.
    pub(super) const BYTES: usize = StateCell::bytes(2 + KEYS / 8);

    /// What is in `cell`.
    ///
    /// # Errors
    ///
    /// If that is none of an input device's.
    pub(super) fn new(cell: StateCell) -> io::Result<Self> {
        let bytes = cell.load().map_err(io::Error::other)?;
        let (selected, bits) = match &bytes[..] {
            [] => ([0; 2], &[][..]),
            [select, subselect, bits @ ..] if bits.len() == KEYS / 8 => {
                ([*select, *subselect], bits)
            }
            _ => {
                return Err(io::Error::other(
                    "what is kept of the input device is damaged",
                ));
            }
        };
        let keys = (0u16..).zip(bits).flat_map(|(place, byte)| {
            let set = (0..8).filter(move |bit| byte & 1 << bit != 0);
            set.map(move |bit| 8 * place + bit)
        });
        Ok(Self {
            pressed: keys.collect(),
            selected,
            cell,
        })
    }

    pub(super) fn selected(&self) -> [u8; 2] {
        self.selected
    }

    pub(super) fn select(&mut self, place: usize, value: u8) {
        self.selected[place] = value;
        self.store();
    }

    /// The keys that the guest may take for pressed.
    pub(super) fn pressed(&self) -> &BTreeSet<u16> {
        &self.pressed
    }

    /// The guest may know from now on that `key` is pressed, or knows that it is so no more.
    pub(super) fn set_pressed(&mut self, key: u16, is_pressed: bool) {
        let has_changed = match is_pressed {
            true => self.pressed.insert(key),
            false => self.pressed.remove(&key),
        };
        if has_changed {
            self.store();
        }
    }

    /// There is a new driver.
    pub(super) fn forget(&mut self) {
        self.selected = [0; 2];
        self.pressed.clear();
        self.store();
    }

    fn store(&self) {
        let mut bytes = self.selected.to_vec();
        bytes.resize(2 + KEYS / 8, 0);
        for key in &self.pressed {
            bytes[2 + usize::from(key / 8)] |= 1 << (key % 8);
        }
        self.cell
            .store(&bytes)
            .expect("a cell with room for all keys");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::StateArea;

    #[test]
    fn what_was_kept_is_read_and_what_is_damaged_is_refused() {
        let area = StateArea::private(Kept::BYTES).unwrap();
        let cell = StateCell::new(area);
        let mut kept = Kept::new(cell.clone()).unwrap();
        kept.select(0, 0x11);
        kept.select(1, 3);
        for key in [0, 30, 0x2ff] {
            kept.set_pressed(key, true);
        }
        kept.set_pressed(30, false);
        let read = Kept::new(cell.clone()).unwrap();
        assert_eq!(read.selected(), [0x11, 3]);
        assert_eq!(*read.pressed(), BTreeSet::from([0, 0x2ff]));
        kept.forget();
        let read = Kept::new(cell.clone()).unwrap();
        assert!(read.selected() == [0; 2] && read.pressed().is_empty());
        cell.store(&[0; 5]).unwrap();
        assert!(Kept::new(cell).is_err());
    }
}
