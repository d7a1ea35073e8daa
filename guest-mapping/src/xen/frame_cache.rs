//! A guest's frames that stay mapped for data, in a guest that grants nothing.

use super::Mapping;
use crate::{Gfn, PAGE_SIZE};
use std::collections::{HashMap, VecDeque};
use std::io;

/// Frames that are mapped together, aligned: a call for one costs as much as several more, and a guest's
/// buffers lie near each other.
const AREA_FRAMES: usize = 16;

/// Frames that stay mapped for data, a guest: 64 MiB, as large as Linux's pool of bounce buffers
/// (`swiotlb=force`).
const MAX_FRAMES: usize = 16384;

const MAX_AREAS: usize = MAX_FRAMES / AREA_FRAMES;

/// The frames mapped so far, for all devices of a guest; when full, those mapped first make room.
pub struct FrameCache<M = Mapping> {
    areas: HashMap<AreaNumber, Area<M>>,
    order: VecDeque<AreaNumber>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct AreaNumber(u64);

/// Neighbouring frames, mapped side by side.
struct Area<M> {
    mapping: M,
    /// The errno of each frame, zero for those that are mapped.
    errors: Vec<i32>,
}

impl<M> Default for FrameCache<M> {
    fn default() -> Self {
        Self {
            areas: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<M> FrameCache<M> {
    /// The page of `gfn`: in which mapping, and at which byte. `map` maps frames side by side, with an errno
    /// for each that it cannot, if it is not mapped yet.
    ///
    /// # Errors
    ///
    /// The errno of a frame that cannot be mapped: the guest has none there.
    pub(super) fn page(
        &mut self,
        Gfn(gfn): Gfn,
        map: impl FnOnce(&[Gfn]) -> io::Result<(M, Vec<i32>)>,
    ) -> Result<(&M, usize), i32> {
        let number = AreaNumber(gfn / AREA_FRAMES as u64);
        let index = usize::try_from(gfn % AREA_FRAMES as u64).expect("less than AREA_FRAMES");
        let known = self.areas.get(&number);
        // A frame that the guest did not have may have come since.
        if known.is_none_or(|area| area.errors[index] != 0) {
            self.make_room(number);
            let first = number.0 * AREA_FRAMES as u64;
            let frames: Vec<Gfn> = (first..first + AREA_FRAMES as u64).map(Gfn).collect();
            let (mapping, errors) =
                map(&frames).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
            if errors[index] != 0 {
                return Err(errors[index]);
            }
            self.areas.insert(number, Area { mapping, errors });
            self.order.push_back(number);
        }
        Ok((&self.areas[&number].mapping, index * PAGE_SIZE))
    }

    /// Forgets what is mapped of `number`, or of what was mapped first if there is no room for more.
    fn make_room(&mut self, number: AreaNumber) {
        if self.areas.remove(&number).is_some() {
            self.order.retain(|other| *other != number);
        } else if self.order.len() == MAX_AREAS
            && let Some(first) = self.order.pop_front()
        {
            self.areas.remove(&first);
        }
    }

    /// Forgets all that is mapped. False if nothing was.
    pub(super) fn clear(&mut self) -> bool {
        let any = !self.areas.is_empty();
        *self = Self::default();
        any
    }

    /// Pages in all areas, those of frames that could not be mapped too: the kernel has given a page of
    /// dom0's for each.
    pub(super) fn pages(&self) -> usize {
        self.areas.len() * AREA_FRAMES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    const AREA: u64 = AREA_FRAMES as u64;

    /// What stands for a mapping: its first frame.
    type Mapped = Rc<Gfn>;

    fn mapped(frames: &[Gfn]) -> io::Result<(Mapped, Vec<i32>)> {
        Ok((Rc::new(frames[0]), vec![0; frames.len()]))
    }

    fn not_again(_: &[Gfn]) -> io::Result<(Mapped, Vec<i32>)> {
        panic!("it is mapped")
    }

    #[test]
    fn neighbours_are_mapped_together_and_once() {
        let mut cache = FrameCache::default();
        let first = 5 * AREA;
        let (mapping, at) = cache.page(Gfn(first + 3), mapped).unwrap();
        assert_eq!((**mapping, at), (Gfn(first), 3 * PAGE_SIZE));
        for index in 0..AREA_FRAMES {
            let (_, at) = cache.page(Gfn(first + index as u64), not_again).unwrap();
            assert_eq!(at, index * PAGE_SIZE);
        }
        assert_eq!(cache.pages(), AREA_FRAMES);
    }

    #[test]
    fn no_more_stays_mapped_than_there_is_room_for() {
        let mut cache = FrameCache::default();
        let (first, _) = cache.page(Gfn(0), mapped).unwrap();
        let first = Rc::downgrade(first);
        for area in 1..MAX_AREAS as u64 {
            cache.page(Gfn(area * AREA), mapped).unwrap();
        }
        assert!(first.upgrade().is_some());
        cache.page(Gfn(MAX_AREAS as u64 * AREA), mapped).unwrap();
        assert_eq!(cache.pages(), MAX_FRAMES);
        assert!(first.upgrade().is_none(), "the oldest is still mapped");
        cache.page(Gfn(AREA), not_again).unwrap();
    }

    #[test]
    fn a_frame_that_cannot_be_mapped_is_tried_again_and_holds_nothing() {
        let mut cache = FrameCache::default();
        let all_but_one = |frames: &[Gfn]| {
            let errors = frames
                .iter()
                .map(|Gfn(gfn)| libc::EINVAL * i32::from(*gfn == 1));
            Ok((Rc::new(frames[0]), errors.collect()))
        };
        for _ in 0..2 {
            assert_eq!(cache.page(Gfn(1), all_but_one).err(), Some(libc::EINVAL));
            assert_eq!(cache.pages(), 0);
        }
        let (with_hole, _) = cache.page(Gfn(0), all_but_one).unwrap();
        let with_hole = Rc::downgrade(with_hole);
        let (_, at) = cache.page(Gfn(1), mapped).unwrap();
        assert_eq!(
            (at, cache.pages(), cache.order.len()),
            (PAGE_SIZE, AREA_FRAMES, 1)
        );
        assert!(with_hole.upgrade().is_none(), "the hole is not to be used");
        let failing = |_: &[Gfn]| Err(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(cache.page(Gfn(AREA), failing).err(), Some(libc::ENOMEM));
        assert_eq!(cache.pages(), AREA_FRAMES);
    }

    #[test]
    fn the_last_frame_that_an_address_can_name_has_neighbours() {
        let mut cache = FrameCache::default();
        let last = (1 << (63 - 12)) - 1;
        let (_, at) = cache.page(Gfn(last), mapped).unwrap();
        assert_eq!(at, (AREA_FRAMES - 1) * PAGE_SIZE);
    }
}
