//! What a guest has written to a port: the newest of it, in memory that outlives this process.

use crate::persist::{StateArea, WORD};
use crate::tuning::CONSOLE_PIECE;
use vm_memory::Bytes;

/// The word that counts the bytes that were written, above [`MARK_BITS`] that say of which request the last were.
const WRITTEN: usize = 0;
const MARK_BITS: u32 = 16;
const FIRST_BYTE: usize = 3 * WORD;

/// Room for what is kept, and for what is being written: a death in between leaves what is kept whole.
const ROOM: usize = History::KEPT + CONSOLE_PIECE;

/// The newest output of a port. Its bytes are counted from the guest's first one on.
pub(super) struct History {
    area: StateArea,
}

/// Who goes on reading in another process where it was in this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    Log,
    /// Somebody has the pseudoterminal open.
    Pty,
}

impl Reader {
    /// The word that has one more than the position up to which it has read, or zero.
    fn word(self) -> usize {
        match self {
            Self::Log => 1,
            Self::Pty => 2,
        }
    }
}

/// Which request of a queue it is, by its position in the used ring.
///
/// A request whose end was written, and which was not completed when its process died, must not be written once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(u16);

impl Mark {
    /// None, or one that is not at its end.
    pub(super) const NONE: Self = Self(0);

    /// That of the request which is completed after `completed` others.
    pub(super) fn after(completed: u64) -> Self {
        let number = 1 + completed % u64::from(u16::MAX);
        Self(u16::try_from(number).expect("16 bits"))
    }
}

impl History {
    /// Bytes that are kept.
    pub(super) const KEPT: usize = 256 << 10;
    /// Bytes of its memory.
    pub(super) const BYTES: usize = FIRST_BYTE + ROOM;

    /// The history in `area`, of [`History::BYTES`]; zeros are an empty one.
    pub(super) fn new(area: StateArea) -> Self {
        Self { area }
    }

    /// Where the next byte will be.
    pub(super) fn end(&self) -> u64 {
        self.area.load(WRITTEN) >> MARK_BITS
    }

    /// Where the oldest byte is that is kept.
    pub(super) fn begin(&self) -> u64 {
        self.end().saturating_sub(Self::KEPT as u64)
    }

    /// Whether the end of this request was written last.
    pub(super) fn has(&self, mark: Mark) -> bool {
        self.mark() == mark
    }

    fn mark(&self) -> Mark {
        let low = self.area.load(WRITTEN) & u64::from(u16::MAX);
        Mark(u16::try_from(low).expect("16 bits"))
    }

    /// Adds `bytes`, [`CONSOLE_PIECE`] at most, of the request `mark`.
    pub(super) fn append(&self, bytes: &[u8], mark: Mark) {
        let end = self.end();
        let (place, room) = place(end);
        let (here, rest) = bytes.split_at(bytes.len().min(room));
        for (place, bytes) in [(place, here), (0, rest)] {
            let slice = self.area.slice(FIRST_BYTE + place, bytes.len());
            slice.write_slice(bytes, 0).expect("as long as the slice");
        }
        self.set_end(end + bytes.len() as u64, mark);
    }

    /// Adds a byte that is of no request.
    pub(super) fn append_byte(&self, byte: u8) {
        self.append(&[byte], self.mark());
    }

    /// The queue is no more: no request of the next one was written.
    pub(super) fn forget_mark(&self) {
        self.set_end(self.end(), Mark::NONE);
    }

    fn set_end(&self, end: u64, Mark(mark): Mark) {
        self.area.store(WRITTEN, end << MARK_BITS | u64::from(mark));
    }

    /// Reads what follows from byte `from` on, which is kept, into `to`: as much as there is, or lies together.
    pub(super) fn read<'a>(&self, from: u64, to: &'a mut [u8]) -> &'a [u8] {
        let (place, room) = place(from);
        let there = usize::try_from(self.end().saturating_sub(from)).unwrap_or(usize::MAX);
        let len = to.len().min(room).min(there);
        let slice = self.area.slice(FIRST_BYTE + place, len);
        slice
            .read_slice(&mut to[..len], 0)
            .expect("as long as the slice");
        &to[..len]
    }

    /// Up to where `reader` has read, if it was there when this was noted.
    pub(super) fn reader(&self, reader: Reader) -> Option<u64> {
        let position = self.area.load(reader.word()).checked_sub(1)?;
        Some(position.clamp(self.begin(), self.end()))
    }

    /// Notes up to where `reader` has read, or that it is not there.
    pub(super) fn note_reader(&self, reader: Reader, position: Option<u64>) {
        let word = position.map_or(0, |position| position + 1);
        self.area.store(reader.word(), word);
    }
}

/// Where byte `position` is in the room, and how many bytes there are from there to its end.
fn place(position: u64) -> (usize, usize) {
    let place = usize::try_from(position % ROOM as u64).expect("less than the room");
    (place, ROOM - place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(history: &History, mut from: u64) -> Vec<u8> {
        let mut found = Vec::new();
        let mut bytes = [0; 1000];
        loop {
            let read = history.read(from, &mut bytes);
            if read.is_empty() {
                return found;
            }
            from += read.len() as u64;
            found.extend(read);
        }
    }

    #[test]
    fn the_newest_bytes_are_kept_in_their_order() {
        let area = StateArea::private(History::BYTES).unwrap();
        let history = History::new(area.clone());
        assert_eq!((history.begin(), history.end()), (0, 0));
        let mut written = Vec::new();
        for (round, len) in [1, 1000, 7, CONSOLE_PIECE, 60_001]
            .into_iter()
            .cycle()
            .take(40)
            .enumerate()
        {
            let mark = round.to_le_bytes()[0];
            let bytes: Vec<_> = (0..len).map(|at| mark ^ at.to_le_bytes()[0]).collect();
            history.append(&bytes, Mark::after(round as u64));
            written.extend(bytes);
            assert_eq!(history.end(), written.len() as u64);
            let begin = usize::try_from(history.begin()).unwrap();
            assert_eq!(written.len() - begin, written.len().min(History::KEPT));
            assert!(
                all(&history, history.begin()) == written[begin..],
                "{round}"
            );
        }
        // As the next process finds it.
        let next = History::new(area);
        assert!(next.has(Mark::after(39)) && !next.has(Mark::after(38)));
        next.append_byte(7);
        assert!(next.has(Mark::after(39)));
        next.forget_mark();
        assert_eq!((next.end(), next.mark()), (history.end(), Mark::NONE));
        assert_eq!(all(&next, next.end() - 1), [7]);
    }

    #[test]
    fn marks_go_on_where_a_rings_index_begins_again() {
        assert_eq!(Mark::after(0), Mark(1));
        assert_eq!(Mark::after(65_534), Mark(u16::MAX));
        assert_eq!(Mark::after(65_535), Mark(1));
    }

    #[test]
    fn readers_go_on_where_they_were_as_far_as_that_is_kept() {
        let area = StateArea::private(History::BYTES).unwrap();
        let history = History::new(area);
        assert_eq!(history.reader(Reader::Log), None);
        history.append(&[1; 100], Mark::NONE);
        history.note_reader(Reader::Log, Some(0));
        history.note_reader(Reader::Pty, Some(7));
        assert_eq!(history.reader(Reader::Log), Some(0));
        assert_eq!(history.reader(Reader::Pty), Some(7));
        for _ in 0..5 {
            history.append(&[1; CONSOLE_PIECE], Mark::NONE);
        }
        assert_eq!(history.reader(Reader::Pty), Some(history.begin()));
        history.note_reader(Reader::Pty, None);
        assert_eq!(history.reader(Reader::Pty), None);
        history.note_reader(Reader::Log, Some(u64::MAX >> 1));
        assert_eq!(history.reader(Reader::Log), Some(history.end()));
    }
}
