//! What the next process must know of a shadow queue to go on with the same back-end: whose request each head is, where its
//! buffers are, and how many used elements the guest has had.

use super::region::{Region, RingPlaces};
use crate::persist::StateArea;
use std::collections::BTreeMap;
use std::io;
use xen_virtio_guest_mapping::PAGE_SIZE;

/// The word that counts the used elements that were given to the guest, and the one that names the region; an entry for each head
/// follows.
const DELIVERED: usize = 0;
const REGION: usize = 1;
const FIRST_ENTRY: usize = 2;

/// An entry of a head that was offered; then the guest's head, and the first page of the buffers.
const IS_OFFERED: u64 = 1 << 63;
const GUEST_HEAD: u32 = 32;

/// The record of one queue.
#[derive(Clone)]
pub struct ShadowRecord {
    area: StateArea,
}

impl ShadowRecord {
    /// Bytes of the record of a queue of up to `size` entries.
    pub const fn bytes(size: u16) -> usize {
        (FIRST_ENTRY + size as usize) * size_of::<u64>()
    }

    /// The record in `area`, of [`ShadowRecord::bytes`].
    pub fn new(area: StateArea) -> Self {
        Self { area }
    }

    /// A record that ends with this process.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn private(size: u16) -> io::Result<Self> {
        Ok(Self::new(StateArea::private(Self::bytes(size))?))
    }

    /// The queue begins anew, in the region of this [name](Region::name).
    pub(super) fn begin(&self, region: u64) {
        self.area.zero();
        self.area.store(REGION, region);
    }

    /// Whether it is of the region of this name.
    fn is_of(&self, region: u64) -> bool {
        self.area.load(REGION) == region
    }

    /// Head `head` is the guest's request `guest`, whose buffers begin at byte `start` of the region. It is not shown to the
    /// back-end yet.
    pub(super) fn offer(&self, head: u16, guest: u16, start: usize) {
        let page = (start / PAGE_SIZE) as u64;
        let entry = IS_OFFERED | u64::from(guest) << GUEST_HEAD | page;
        self.area.store(FIRST_ENTRY + usize::from(head), entry);
    }

    /// The guest has been given one more.
    pub(super) fn deliver(&self) {
        let delivered = self.area.load(DELIVERED);
        self.area.store(DELIVERED, delivered.wrapping_add(1));
    }

    fn delivered(&self) -> u16 {
        let delivered = self.area.load(DELIVERED) & 0xffff;
        u16::try_from(delivered).expect("16 bits")
    }

    /// Whose request head `head` is, and the first page of its buffers.
    fn entry(&self, head: usize) -> Option<(u16, usize)> {
        let is_there = head < self.area.len() / size_of::<u64>() - FIRST_ENTRY;
        let entry = is_there.then(|| self.area.load(FIRST_ENTRY + head))?;
        let guest = u16::try_from(entry >> GUEST_HEAD & 0xffff).expect("16 bits");
        let page = usize::try_from(entry & 0xffff_ffff).ok()?;
        (entry & IS_OFFERED != 0).then_some((guest, page))
    }
}

/// What a back-end has used that the guest does not have yet, by the guest's head.
pub(super) type Finished = BTreeMap<u16, Done>;

/// A request that a back-end has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    /// How many were used before it.
    pub(super) order: u16,
    /// The first page of its buffers.
    pub(super) page: usize,
    /// Bytes, as the back-end says.
    pub(super) written: u32,
}

/// A queue as an earlier process has left it.
pub(super) struct Left {
    entries: Vec<Option<(u16, usize)>>,
    delivered: u16,
}

impl Left {
    /// What `record` says of a queue of `size` entries, if it was one of the region of this name.
    pub(super) fn of(record: &ShadowRecord, size: u16, region: u64) -> Option<Self> {
        let heads = 0..usize::from(size);
        record.is_of(region).then(|| Self {
            entries: heads.map(|head| record.entry(head)).collect(),
            delivered: record.delivered(),
        })
    }

    /// A queue of which the back-end has had nothing.
    pub(super) fn nothing() -> Self {
        Self {
            entries: Vec::new(),
            delivered: 0,
        }
    }

    /// Whether the back-end has had anything.
    pub(super) fn is_nothing(&self) -> bool {
        self.entries.iter().all(Option::is_none)
    }

    /// What the back-end, which has let go of the queue at `places` of `region`, has used since. What no back-end can have used
    /// is none of it.
    pub(super) fn finished(mut self, region: &Region, places: &RingPlaces) -> Finished {
        let memory = region.memory();
        let used = places.used_index(&memory).wrapping_sub(self.delivered);
        let mut finished = Finished::new();
        if self.entries.is_empty() {
            return finished;
        }
        for step in 0..used.min(places.size) {
            let [id, written] = places.used_element(self.delivered.wrapping_add(step), &memory);
            let head = usize::try_from(id).ok();
            let entry = head.and_then(|head| self.entries.get_mut(head));
            if let Some((guest, page)) = entry.and_then(Option::take) {
                let order = step;
                finished.insert(
                    guest,
                    Done {
                        order,
                        page,
                        written,
                    },
                );
            }
        }
        finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_was_used_and_not_delivered_is_found() {
        let region = Region::new(&[4], 4 * PAGE_SIZE).unwrap();
        let places = region.rings()[0].clone();
        let record = ShadowRecord::private(4).unwrap();
        record.begin(region.name());
        let left = || Left::of(&record, 4, region.name()).unwrap();
        for (head, guest, page) in [(0, 7, 2), (1, 8, 3), (2, 9, 4)] {
            record.offer(head, guest, page * PAGE_SIZE);
        }
        let memory = region.memory();
        // The first was delivered; head 0 is another request's since. One is used twice, one is nobody's.
        record.deliver();
        record.offer(0, 10, 5 * PAGE_SIZE);
        for (slot, element) in [(0u32, [0u32, 1]), (1, [2, 5]), (2, [2, 6]), (3, [99, 7])] {
            let place = places.used + 4 + 8 * slot as usize;
            memory.write_obj(element, place).unwrap();
        }
        memory.write_obj(4u16, places.used + 2).unwrap();
        let finished = left().finished(&region, &places);
        let done = Done {
            order: 0,
            page: 4,
            written: 5,
        };
        assert_eq!(finished, Finished::from([(9, done)]));
        // An index that is anything.
        memory.write_obj(60_000u16, places.used + 2).unwrap();
        assert!(left().finished(&region, &places).len() <= 2);
        assert!(Left::of(&record, 4, region.name() + 1).is_none());
        record.begin(region.name());
        assert!(left().finished(&region, &places).is_empty());
    }
}
