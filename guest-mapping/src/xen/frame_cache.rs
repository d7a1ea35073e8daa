//! A guest's frames that stay mapped for data, in a guest that grants nothing.

use super::{Mapping, Privcmd};
use crate::{Gfn, PAGE_SIZE};
use std::collections::{HashMap, VecDeque};
use vm_memory::Permissions;

/// Frames that are mapped together, aligned: a call for one costs as much as several more, and a guest's
/// buffers lie near each other.
const AREA_FRAMES: usize = 16;

/// Frames that stay mapped for data, a device: 64 MiB, as large as Linux's pool of bounce buffers
/// (`swiotlb=force`).
const MAX_CACHED_FRAMES: usize = 16384;

const MAX_AREAS: usize = MAX_CACHED_FRAMES / AREA_FRAMES;

/// The areas mapped so far; when full, the one mapped first makes room.
#[derive(Default)]
pub(super) struct FrameCache {
    areas: HashMap<AreaNumber, Area>,
    order: VecDeque<AreaNumber>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct AreaNumber(u64);

/// Neighbouring frames.
struct Area {
    mapping: Mapping,
    /// The errno of each frame, zero for those that are mapped.
    errors: Vec<i32>,
}

impl Area {
    /// # Errors
    ///
    /// The errno.
    fn map(privcmd: &Privcmd, AreaNumber(number): AreaNumber) -> Result<Self, i32> {
        let first = number * AREA_FRAMES as u64;
        let frames: Vec<Gfn> = (first..first + AREA_FRAMES as u64).map(Gfn).collect();
        let (mapping, errors) = privcmd
            .map_frames(&frames, Permissions::ReadWrite)
            .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
        Ok(Self { mapping, errors })
    }
}

impl FrameCache {
    /// The page of `gfn`: in which mapping, and at which byte. It is mapped if it was not.
    ///
    /// # Errors
    ///
    /// The errno of a frame that cannot be mapped: the guest has none there.
    pub(super) fn page(
        &mut self,
        privcmd: &Privcmd,
        Gfn(gfn): Gfn,
    ) -> Result<(&Mapping, usize), i32> {
        let number = AreaNumber(gfn / AREA_FRAMES as u64);
        let index = usize::try_from(gfn % AREA_FRAMES as u64).expect("less than AREA_FRAMES");
        let known = self.areas.get(&number);
        // The guest may have got a frame there since.
        if known.is_none_or(|area| area.errors[index] != 0) {
            self.map(privcmd, number)?;
        }
        let area = &self.areas[&number];
        match area.errors[index] {
            0 => Ok((&area.mapping, index * PAGE_SIZE)),
            errno => Err(errno),
        }
    }

    fn map(&mut self, privcmd: &Privcmd, number: AreaNumber) -> Result<(), i32> {
        if self.areas.remove(&number).is_some() {
            self.order.retain(|other| *other != number);
        } else if self.order.len() == MAX_AREAS
            && let Some(first) = self.order.pop_front()
        {
            self.areas.remove(&first);
        }
        self.areas.insert(number, Area::map(privcmd, number)?);
        self.order.push_back(number);
        Ok(())
    }

    /// Pages in all areas, those of frames that could not be mapped too: the kernel has given a page of
    /// dom0's for each.
    pub(super) fn pages(&self) -> usize {
        self.areas.len() * AREA_FRAMES
    }
}
