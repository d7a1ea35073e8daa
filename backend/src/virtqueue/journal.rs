//! Which requests of a queue are with the device: what the next process must know of this one's queue.
//!
//! Where the driver's rings are read from and written to follows from it. An entry a head of the queue says
//! who has it; the count of published used elements says which of those that are done the driver has seen.

use super::queue::MAX_QUEUE_SIZE;
use crate::persist::StateArea;
use std::io;

/// The word that counts the used elements that the driver sees; the entries follow it.
const PUBLISHED: usize = 0;
const FIRST_ENTRY: usize = 1;

/// The two lowest bits of an entry; the others are the position in a ring.
const KIND: u64 = 0b11;
const TAKEN: u64 = 1;
const DONE: u64 = 2;

/// The journal of one queue. Positions count the elements of a ring since the queue started; the ring's own
/// index is their low 16 bits.
pub struct QueueJournal {
    area: StateArea,
}

/// Where a queue stands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RecoveredPositions {
    /// The next used element.
    pub(crate) used: u64,
    /// The next available element.
    pub(crate) available: u64,
    /// Heads that were taken from the available ring and are not on the used ring, in their order.
    pub(crate) taken: Vec<u16>,
    /// Used elements are in the ring that the driver may not have seen.
    pub(crate) unpublished: bool,
}

/// Says nothing that a device could go on from.
#[derive(Debug, thiserror::Error)]
#[error("the record of the queue's requests is damaged")]
pub struct JournalError;

impl QueueJournal {
    /// Bytes that the journal of a queue of up to `size` entries takes.
    pub const fn bytes(size: u16) -> usize {
        (FIRST_ENTRY + size as usize) * size_of::<u64>()
    }

    /// The journal in `area`, of [`QueueJournal::bytes`]; zeros are one of a queue that has not started.
    pub fn new(area: StateArea) -> Self {
        Self { area }
    }

    /// A journal that ends with this process.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn private() -> io::Result<Self> {
        Ok(Self::new(StateArea::private(Self::bytes(MAX_QUEUE_SIZE))?))
    }

    /// Begins anew, for a queue of `size` entries that does not run.
    pub fn clear(&self, size: u16) {
        let bytes = Self::bytes(size).min(self.area.len());
        self.area.part(0, bytes).zero();
    }

    /// Where a queue of `size` entries stands.
    pub(crate) fn recover(&self, size: u16) -> Result<RecoveredPositions, JournalError> {
        if Self::bytes(size) > self.area.len() {
            return Err(JournalError);
        }
        let published = self.area.load(PUBLISHED);
        let mut taken = Vec::new();
        let mut done = 0;
        for head in 0..size {
            let entry = self.area.load(place(head));
            let position = entry >> 2;
            match entry & KIND {
                TAKEN => taken.push((position, head)),
                // Elements are written in order, so that those not published are the next ones.
                DONE if position >= published => done = done.max(position - published + 1),
                _ => {}
            }
        }
        if done > u64::from(size) || published > u64::MAX >> 3 {
            return Err(JournalError);
        }
        taken.sort_unstable();
        let used = published + done;
        Ok(RecoveredPositions {
            used,
            available: used + taken.len() as u64,
            taken: taken.into_iter().map(|(_, head)| head).collect(),
            unpublished: done > 0,
        })
    }

    /// The next used element of a queue of `size` entries, modulo 2^16, and whether it is that of the available ring too: nothing
    /// is with the device, and all that was done is published. Nothing, if the journal is damaged.
    pub fn positions(&self, size: u16) -> Option<(u16, bool)> {
        let positions = self.recover(size).ok()?;
        let is_settled = positions.taken.is_empty() && !positions.unpublished;
        let next = u16::try_from(positions.used & 0xffff).expect("16 bits");
        Some((next, is_settled))
    }

    /// How many requests of a queue of `size` entries are with the device; none, if the journal is damaged.
    pub fn under_way(&self, size: u16) -> usize {
        self.recover(size)
            .map_or(0, |positions| positions.taken.len())
    }

    /// Whether the request at `head` is with the device.
    pub(crate) fn has(&self, head: u16) -> bool {
        let entry = self.area.load(place(head));
        match entry & KIND {
            TAKEN => true,
            DONE => entry >> 2 >= self.area.load(PUBLISHED),
            _ => false,
        }
    }

    /// The request at `head`, available element `position`, is with the device.
    pub(crate) fn take(&self, head: u16, position: u64) {
        self.area.store(place(head), position << 2 | TAKEN);
    }

    /// Used element `position` is written, and says that the request at `head` is done.
    pub(crate) fn done(&self, head: u16, position: u64) {
        self.area.store(place(head), position << 2 | DONE);
    }

    /// The driver sees the used elements before `position`.
    pub fn publish(&self, position: u64) {
        self.area.store(PUBLISHED, position);
    }
}

fn place(head: u16) -> usize {
    FIRST_ENTRY + usize::from(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovered(journal: &QueueJournal) -> (u64, u64, Vec<u16>, bool) {
        let RecoveredPositions {
            used,
            available,
            taken,
            unpublished,
        } = journal.recover(8).unwrap();
        (used, available, taken, unpublished)
    }

    #[test]
    fn every_step_of_a_request_can_be_gone_on_from() {
        let journal = QueueJournal::private().unwrap();
        assert_eq!(recovered(&journal), (0, 0, vec![], false));
        journal.take(5, 0);
        journal.take(2, 1);
        assert_eq!(recovered(&journal), (0, 2, vec![5, 2], false));
        assert!(journal.has(5) && journal.has(2) && !journal.has(0));
        journal.done(2, 0);
        assert_eq!(recovered(&journal), (1, 2, vec![5], true));
        assert!(journal.has(2), "the driver has not seen it yet");
        journal.publish(1);
        assert_eq!(recovered(&journal), (1, 2, vec![5], false));
        assert!(!journal.has(2));
        journal.take(2, 2);
        journal.done(5, 1);
        journal.done(2, 2);
        assert_eq!(recovered(&journal), (3, 3, vec![], true));
        journal.publish(3);
        assert_eq!(recovered(&journal), (3, 3, vec![], false));
        journal.clear(8);
        assert_eq!(recovered(&journal), (0, 0, vec![], false));
    }

    #[test]
    fn positions_go_on_where_a_rings_index_begins_again() {
        let journal = QueueJournal::private().unwrap();
        journal.done(3, 65_534);
        journal.publish(65_535);
        journal.take(3, 65_535);
        journal.take(4, 65_536);
        assert_eq!(recovered(&journal), (65_535, 65_537, vec![3, 4], false));
    }

    #[test]
    fn a_damaged_journal_is_an_error() {
        let journal = QueueJournal::private().unwrap();
        journal.done(1, 9);
        assert!(journal.recover(8).is_err());
        journal.clear(8);
        journal.publish(u64::MAX);
        assert!(journal.recover(8).is_err());
    }
}
