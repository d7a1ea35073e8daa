//! One shadow queue, from the side of a driver (virtio 1.3, 2.7). Nothing that the back-end can write is believed: which
//! requests it has is kept apart.

use super::region::RingPlaces;
use smallvec::SmallVec;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, VolatileSlice};

/// What a back-end did that no back-end may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendFault {
    #[error("its used ring is {ahead} elements ahead, and it has {in_flight} requests")]
    UsedIndex { ahead: u16, in_flight: u16 },
    #[error("it has used the request {id}, which it does not have")]
    NotInFlight { id: u32 },
    #[error(
        "it says that it has written {len} bytes for the request {id}, which has room for {room}"
    )]
    Length { id: u32, len: u32, room: u32 },
}

/// A buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Byte of the request's memory.
    pub(super) place: usize,
    pub(super) len: u32,
    pub(super) writable: bool,
}

impl Part {
    /// The byte behind it.
    pub(super) fn end(&self) -> usize {
        self.place + self.len as usize
    }
}

impl RingPlaces {
    /// How many requests the back-end says that it has used, modulo 2^16.
    pub(super) fn used_index(&self, memory: &VolatileSlice<'_>) -> u16 {
        load(memory, self.used + 2)
    }

    /// Element `index` of the used ring, modulo its size: `le32 id`, `le32 len`. It is read once, whatever the back-end writes
    /// there meanwhile.
    pub(super) fn used_element(&self, index: u16, memory: &VolatileSlice<'_>) -> [u32; 2] {
        let slot = usize::from(index % self.size);
        let element: [u32; 2] = memory
            .read_obj(self.used + 4 + 8 * slot)
            .expect("in the region");
        element.map(u32::from_le)
    }
}

/// The driver's side of a queue in the region.
pub(super) struct ShadowRing {
    places: RingPlaces,
    /// What the back-end knows the region's first byte by.
    base: u64,
    event_idx: bool,
    /// See [`Rules::overstate`](super::Rules::overstate).
    pub(super) overstate: bool,
    free: Vec<u16>,
    /// The descriptors and the writable bytes of the requests that the back-end has, by head.
    chains: Vec<Option<(SmallVec<[u16; 4]>, u32)>>,
    in_flight: u16,
    next_available: Wrapping<u16>,
    /// The elements before it the back-end sees.
    published: Wrapping<u16>,
    next_used: Wrapping<u16>,
}

/// A request that the back-end has used, and the bytes that it wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) head: u16,
    pub(super) written: u32,
    /// Its descriptors, which are nobody else's until [`ShadowRing::give_back`].
    pub(super) descriptors: SmallVec<[u16; 4]>,
}

impl ShadowRing {
    /// An empty queue at `places` of `memory`, whose first byte the back-end knows as `base`.
    pub(super) fn new(
        places: &RingPlaces,
        base: u64,
        event_idx: bool,
        memory: &VolatileSlice<'_>,
    ) -> Self {
        let entries = usize::from(places.size);
        for (place, len) in [
            (places.descriptors, 16 * entries),
            (places.available, 6 + 2 * entries),
            (places.used, 6 + 8 * entries),
        ] {
            part(memory, place, len).copy_from(&vec![0u8; len]);
        }
        Self {
            base,
            event_idx,
            overstate: false,
            free: (0..places.size).rev().collect(),
            chains: vec![None; entries],
            in_flight: 0,
            next_available: Wrapping(0),
            published: Wrapping(0),
            next_used: Wrapping(0),
            places: places.clone(),
        }
    }

    /// Descriptors that no request has.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Offers a request of `parts`, from byte `start` of the region on, to the back-end, which sees it after the next [`ShadowRing::publish`]; its head.
    ///
    /// # Panics
    ///
    /// If there are none, or more than [`ShadowRing::room`].
    pub(super) fn offer(
        &mut self,
        parts: &[Part],
        start: usize,
        memory: &VolatileSlice<'_>,
    ) -> u16 {
        let first = self.free.len() - parts.len();
        let descriptors: SmallVec<[u16; 4]> = self.free.drain(first..).collect();
        let mut room = 0;
        for (index, part) in parts.iter().enumerate() {
            let mut flags = 0;
            let mut next = 0;
            if part.writable {
                flags |= VRING_DESC_F_WRITE;
                room += part.len;
            }
            if let Some(following) = descriptors.get(index + 1) {
                flags |= VRING_DESC_F_NEXT;
                next = *following;
            }
            let flags = u16::try_from(flags).expect("flags of 16 bits");
            let address = self.base + (start + part.place) as u64;
            let descriptor = Descriptor::new(address, part.len, flags, next);
            let place = self.places.descriptors + 16 * usize::from(descriptors[index]);
            memory.write_obj(descriptor, place).expect("in the region");
        }
        let head = descriptors[0];
        let slot = usize::from(self.next_available.0 % self.places.size);
        let place = self.places.available + 4 + 2 * slot;
        memory
            .store(head.to_le(), place, Ordering::Relaxed)
            .expect("in the region");
        self.next_available += 1;
        self.chains[usize::from(head)] = Some((descriptors, room));
        self.in_flight += 1;
        head
    }

    /// Shows the back-end what was offered. True if it is to be kicked.
    pub(super) fn publish(&mut self, memory: &VolatileSlice<'_>) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.published = new;
        let index = self.places.available + 2;
        memory
            .store(new.0.to_le(), index, Ordering::Release)
            .expect("in the region");
        // The back-end sees the index before we read its wish, or it looks once more after it has written that.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // virtio 1.3, 2.7.10: a kick if the entry that `avail_event` names is among the new ones.
            let entries = usize::from(self.places.size);
            let event = Wrapping(load(memory, self.places.used + 4 + 8 * entries));
            new - event - Wrapping(1) < new - old
        } else {
            u32::from(load(memory, self.places.used)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// The next request that the back-end has used, if there is one.
    ///
    /// # Errors
    ///
    /// [`BackendFault`] for one that it does not have, or cannot have used so.
    pub(super) fn next_used(
        &mut self,
        memory: &VolatileSlice<'_>,
    ) -> Result<Option<Used>, BackendFault> {
        let index: u16 = memory
            .load(self.places.used + 2, Ordering::Acquire)
            .expect("in the region");
        let ahead = (Wrapping(u16::from_le(index)) - self.next_used).0;
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > self.in_flight {
            let in_flight = self.in_flight;
            return Err(BackendFault::UsedIndex { ahead, in_flight });
        }
        let [id, len] = self.places.used_element(self.next_used.0, memory);
        let chain = usize::try_from(id).ok();
        let chain = chain.and_then(|head| self.chains.get_mut(head));
        let room = match &chain {
            Some(Some((_, room))) => *room,
            Some(None) | None => return Err(BackendFault::NotInFlight { id }),
        };
        if len > room && !self.overstate {
            return Err(BackendFault::Length { id, len, room });
        }
        let len = len.min(room);
        let (descriptors, _) = chain.and_then(Option::take).expect("it is there");
        let head = descriptors[0];
        self.in_flight -= 1;
        self.next_used += 1;
        Ok(Some(Used {
            head,
            written: len,
            descriptors,
        }))
    }

    /// The guest has a request that the back-end has used: its descriptors are free.
    pub(super) fn give_back(&mut self, descriptors: SmallVec<[u16; 4]>) {
        self.free.extend(descriptors);
    }

    /// Asks the back-end to tell of the next request that it uses, behind `skip` others. True if it has used so many meanwhile.
    pub(super) fn want_calls(&mut self, skip: usize, memory: &VolatileSlice<'_>) -> bool {
        let skip = Wrapping(u16::try_from(skip).expect("fewer than the ring has"));
        if self.event_idx {
            // virtio 1.3, 2.7.7: `used_event` stands behind the available ring.
            let place = self.places.available + 4 + 2 * usize::from(self.places.size);
            memory
                .store((self.next_used + skip).0.to_le(), place, Ordering::Relaxed)
                .expect("in the region");
            fence(Ordering::SeqCst);
        }
        let used = Wrapping(load(memory, self.places.used + 2)) - self.next_used;
        match self.event_idx {
            true => used > skip,
            false => used.0 != 0,
        }
    }
}

fn load(memory: &VolatileSlice<'_>, place: usize) -> u16 {
    let value: u16 = memory
        .load(place, Ordering::Acquire)
        .expect("in the region");
    u16::from_le(value)
}

fn part<'a>(memory: &VolatileSlice<'a>, place: usize, len: usize) -> VolatileSlice<'a> {
    memory.subslice(place, len).expect("in the region")
}

#[cfg(test)]
mod tests;
