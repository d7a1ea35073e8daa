//! What the driver reads as the configuration space: what the back-end says, what is ours, and what the driver has written.

use super::class::Class;
use super::selections::Selections;
use crate::device::read_space;
use std::ops::Range;

pub(super) struct ConfigSpace {
    bytes: Vec<u8>,
    /// What is ours, by its place.
    own: Vec<(usize, Vec<u8>)>,
    /// What the driver may write.
    writable: Range<usize>,
    is_written: bool,
    /// What is read by what the driver has written, if the class has it so.
    selections: Option<Selections>,
}

impl ConfigSpace {
    /// A space of `class`, of which the driver has written `written`, if that is anything.
    pub(super) fn new(class: &Class, own: Vec<(usize, Vec<u8>)>, written: &[u8]) -> Self {
        let mut this = Self {
            bytes: vec![0; class.config_bytes],
            own,
            writable: class.writable.clone(),
            is_written: false,
            selections: class.selects.then(Selections::default),
        };
        this.take(&[]);
        this.write(class.writable.start, written);
        this
    }

    pub(super) fn read(&self, offset: usize, to: &mut [u8]) {
        read_space(&self.bytes, offset, to);
    }

    /// Takes in what a back-end says. True if the driver reads something else now.
    pub(super) fn take(&mut self, back_end: &[u8]) -> bool {
        let mut bytes = self.bytes.clone();
        match &mut self.selections {
            Some(selections) => {
                *selections = Selections::decoded(back_end);
                selections.show(&mut bytes);
            }
            None => put(&mut bytes, 0, back_end),
        }
        for (place, own) in &self.own {
            put(&mut bytes, *place, own);
        }
        // What the driver has set stays so with another back-end, which is told.
        if self.is_written {
            put(&mut bytes, self.writable.start, self.written());
        }
        let changed = bytes != self.bytes;
        self.bytes = bytes;
        changed
    }

    /// The driver writes `data` at byte `offset`. True if that is its to write, and something else than was there.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let end = offset.checked_add(data.len());
        let end = end.filter(|end| *end <= self.writable.end && offset >= self.writable.start);
        let place = end.and_then(|end| self.bytes.get_mut(offset..end));
        match place {
            Some(place) if place != data => {
                place.copy_from_slice(data);
                self.is_written = true;
                if let Some(selections) = &self.selections {
                    selections.show(&mut self.bytes);
                }
                true
            }
            Some(_) | None => false,
        }
    }

    /// What the driver has written; nothing if it has not.
    pub(super) fn written(&self) -> &[u8] {
        match self.is_written {
            true => &self.bytes[self.writable.clone()],
            false => &[],
        }
    }

    /// What a back-end is to be told of that, and where. What selects is not told: it has been answered.
    pub(super) fn to_tell(&self) -> Option<(usize, &[u8])> {
        let tells = self.is_written && self.selections.is_none();
        tells.then(|| (self.writable.start, self.written()))
    }

    /// What was written was another driver's.
    pub(super) fn forget_written(&mut self) {
        self.is_written = false;
    }
}

/// Puts `bytes` at `place` of `space`, as far as they fit.
fn put(space: &mut [u8], place: usize, bytes: &[u8]) {
    let to = space.iter_mut().skip(place);
    to.zip(bytes).for_each(|(to, from)| *to = *from);
}

#[cfg(test)]
mod tests {
    use super::super::class::CLASSES;
    use super::*;

    fn space(len: usize, own: Vec<(usize, Vec<u8>)>, writable: Range<usize>) -> ConfigSpace {
        let class = Class {
            config_bytes: len,
            writable,
            ..CLASSES[0].clone()
        };
        ConfigSpace::new(&class, own, &[])
    }

    fn all(space: &ConfigSpace) -> [u8; 8] {
        let mut bytes = [0xee; 8];
        space.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn what_is_ours_covers_what_the_back_end_says() {
        let mut space = space(6, vec![(1, vec![7, 7]), (5, vec![9, 9])], 0..0);
        assert_eq!(all(&space), [0, 7, 7, 0, 0, 9, 0, 0]);
        assert!(space.take(&[1, 2, 3, 4]));
        assert!(!space.take(&[1, 0, 0, 4]));
        assert_eq!(all(&space), [1, 7, 7, 4, 0, 9, 0, 0]);
        // Longer than it is to be.
        assert!(space.take(&[5; 100]));
        assert_eq!(all(&space), [5, 7, 7, 5, 5, 9, 0, 0]);
    }

    #[test]
    fn what_the_driver_has_written_outlives_its_back_end() {
        let mut space = space(4, Vec::new(), 2..3);
        space.take(&[1, 1, 1, 1]);
        for (offset, data) in [
            (0, &[9][..]),
            (3, &[9]),
            (1, &[9, 9]),
            (2, &[9, 9]),
            (usize::MAX, &[9]),
            (2, &[1]),
        ] {
            assert!(!space.write(offset, data), "{offset}");
        }
        assert_eq!(space.to_tell(), None);
        assert!(space.write(2, &[0]));
        assert_eq!(space.to_tell(), Some((2, &[0][..])));
        // Another back-end begins as the first one did.
        assert!(!space.take(&[1, 1, 1, 1]));
        assert_eq!(all(&space)[..4], [1, 1, 0, 1]);
        space.forget_written();
        assert!(space.take(&[1, 1, 1, 1]));
    }

    #[test]
    fn a_driver_that_selects_reads_what_was_answered_for_it() {
        let class = CLASSES.iter().find(|class| class.selects).unwrap();
        let mut space = ConfigSpace::new(class, Vec::new(), &[]);
        let name = [1, 0, 3, b'k', b'e', b'y'];
        assert!(!space.take(&name));
        // As Linux does, a byte at a time.
        assert!(space.write(0, &[1]));
        assert!(!space.write(1, &[0]));
        let mut read = [0; 12];
        space.read(0, &mut read);
        assert_eq!(&read, b"\x01\0\x03\0\0\0\0\0key\0");
        assert_eq!((space.written(), space.to_tell()), (&[1, 0][..], None));
        // The next process goes on from what was written.
        let mut next = ConfigSpace::new(class, Vec::new(), &[1, 0]);
        assert!(next.take(&name));
        next.read(0, &mut read);
        assert_eq!(&read[8..11], b"key");
        assert!(space.write(0, &[2]));
        space.read(0, &mut read);
        assert_eq!(read[2..], [0; 10]);
        assert!(!space.write(2, &[1]));
    }
}
