//! A back-end that does as it likes with its rings.

use super::super::Region;
use super::*;

const SIZE: u16 = 4;

struct Queue {
    region: Region,
    ring: ShadowRing,
}

impl Queue {
    fn new(event_idx: bool) -> Self {
        let region = Region::new(&[SIZE], 1 << 16).unwrap();
        let ring = ShadowRing::new(&region.rings()[0], 1 << 32, event_idx, &region.memory());
        Self { region, ring }
    }

    /// A request of `writable` bytes to write, behind one to read.
    fn offer(&mut self, writable: u32) -> u16 {
        let parts = [(0, 16, false), (4096, writable, true)].map(|(place, len, writable)| Part {
            place,
            len,
            writable,
        });
        self.ring.offer(&parts, 1 << 14, &self.region.memory())
    }

    fn places(&self) -> RingPlaces {
        self.region.rings()[0].clone()
    }

    /// The back-end writes an element, and then the index.
    fn uses(&self, slot: u16, id: u32, len: u32, index: u16) {
        let (memory, used) = (self.region.memory(), self.places().used);
        let element = u64::from(len) << 32 | u64::from(id);
        let place = used + 4 + 8 * usize::from(slot);
        memory.write_obj(element.to_le(), place).unwrap();
        memory.write_obj(index.to_le(), used + 2).unwrap();
    }

    /// What is used next, of which the guest is given what there is: its head, and the bytes that were written.
    fn next(&mut self) -> Result<Option<(u16, u32)>, BackendFault> {
        let used = self.ring.next_used(&self.region.memory())?;
        Ok(used.map(|used| {
            self.ring.give_back(used.descriptors);
            (used.head, used.written)
        }))
    }
}

/// Where that is known of a type's back-ends, more than there is room for counts as all of it.
#[test]
fn an_overstated_length_is_the_room() {
    let mut queue = Queue::new(false);
    let head = queue.offer(8);
    queue.uses(0, head.into(), 9, 1);
    let fault = BackendFault::Length {
        id: head.into(),
        len: 9,
        room: 8,
    };
    assert_eq!(queue.next(), Err(fault));
    queue.ring.overstate = true;
    assert_eq!(queue.next(), Ok(Some((head, 8))));
}

#[test]
fn a_request_comes_back_once_and_its_descriptors_with_it() {
    let mut queue = Queue::new(false);
    let heads = [queue.offer(8), queue.offer(8)];
    assert_eq!((queue.ring.room(), queue.ring.in_flight), (0, 2));
    assert_eq!(queue.next(), Ok(None));
    // In another order than they were offered.
    queue.uses(0, heads[1].into(), 8, 1);
    let used = |head, written| Ok(Some((head, written)));
    assert_eq!(queue.next(), used(heads[1], 8));
    assert_eq!(queue.ring.room(), 2);
    queue.uses(1, heads[0].into(), 0, 2);
    assert_eq!(queue.next(), used(heads[0], 0));
    assert_eq!(queue.next(), Ok(None));
    assert_eq!((queue.ring.room(), queue.ring.in_flight), (SIZE.into(), 0));
    // Rings go round, and indices go on.
    for round in 2..100u16 {
        let head = queue.offer(4);
        assert!(queue.ring.publish(&queue.region.memory()));
        queue.uses(round % SIZE, head.into(), 4, round + 1);
        assert_eq!(queue.next(), used(head, 4));
    }
}

#[test]
fn what_a_back_end_cannot_have_done_is_its_fault() {
    type Writes = fn(&Queue, u16);
    type Expected = fn(BackendFault) -> bool;
    let cases: [(Writes, Expected); 7] = [
        (
            |queue, head| queue.uses(0, head.into(), 9, 1),
            |fault| {
                matches!(
                    fault,
                    BackendFault::Length {
                        len: 9,
                        room: 8,
                        ..
                    }
                )
            },
        ),
        (
            |queue, head| queue.uses(0, head.into(), u32::MAX, 1),
            |fault| matches!(fault, BackendFault::Length { .. }),
        ),
        (
            |queue, head| queue.uses(0, u32::from(head) ^ 1, 0, 1),
            |fault| matches!(fault, BackendFault::NotInFlight { .. }),
        ),
        (
            |queue, _| queue.uses(0, SIZE.into(), 0, 1),
            |fault| matches!(fault, BackendFault::NotInFlight { id: 4 }),
        ),
        (
            |queue, head| queue.uses(0, u32::from(head) | 1 << 16, 0, 1),
            |fault| matches!(fault, BackendFault::NotInFlight { .. }),
        ),
        (
            |queue, head| queue.uses(0, head.into(), 0, 2),
            |fault| {
                matches!(
                    fault,
                    BackendFault::UsedIndex {
                        ahead: 2,
                        in_flight: 1
                    }
                )
            },
        ),
        (
            |queue, head| queue.uses(0, head.into(), 0, u16::MAX),
            |fault| matches!(fault, BackendFault::UsedIndex { .. }),
        ),
    ];
    for (writes, is_expected) in cases {
        let mut queue = Queue::new(false);
        let head = queue.offer(8);
        writes(&queue, head);
        let fault = queue.next().unwrap_err();
        assert!(is_expected(fault), "{fault:?}");
    }
    // The same one twice.
    let mut queue = Queue::new(false);
    let (first, _second) = (queue.offer(8), queue.offer(8));
    queue.uses(0, first.into(), 0, 1);
    queue.next().unwrap();
    queue.uses(1, first.into(), 0, 2);
    let id = first.into();
    assert_eq!(queue.next(), Err(BackendFault::NotInFlight { id }));
}

#[test]
fn a_back_end_is_kicked_when_it_asks_for_it() {
    for event_idx in [false, true] {
        let mut queue = Queue::new(event_idx);
        let used = queue.places().used;
        let wish = |queue: &Queue, flag: u16, event: u16| {
            let memory = queue.region.memory();
            memory.write_obj(flag, used).unwrap();
            memory
                .write_obj(event, used + 4 + 8 * usize::from(SIZE))
                .unwrap();
        };
        queue.offer(1);
        assert!(queue.ring.publish(&queue.region.memory()));
        assert!(
            !queue.ring.publish(&queue.region.memory()),
            "nothing is new"
        );
        // No kicks by the flag, or for a later entry.
        wish(&queue, 1, 7);
        queue.offer(1);
        assert!(!queue.ring.publish(&queue.region.memory()));
    }
}

/// Whatever the back-end writes over the rings, the queue's own record holds.
#[test]
fn a_ring_that_is_written_all_over_is_refused_or_right() {
    for byte in 0..=u8::MAX {
        let mut queue = Queue::new(true);
        let heads = [queue.offer(8), queue.offer(8)];
        let memory = queue.region.memory();
        let rings = memory.subslice(0, queue.region.pool().start).unwrap();
        rings.copy_from(&vec![byte; rings.len()]);
        let mut seen = Vec::new();
        while let Ok(Some(used)) = queue.next() {
            assert!(heads.contains(&used.0) && used.1 <= 8);
            seen.push(used.0);
        }
        assert!(seen.len() <= heads.len());
        queue.ring.want_calls(0, &queue.region.memory());
        queue.ring.publish(&queue.region.memory());
    }
}
