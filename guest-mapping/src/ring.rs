//! Ring memory: the parts of a guest that stay mapped while a queue runs.

use std::any::Any;
use std::ptr::NonNull;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// One or more mapped areas, found by the address that the guest gave, through vm-memory's
/// [`GuestMemory`]. Dropping it unmaps them.
#[derive(Debug)]
pub struct RingMemory {
    areas: Vec<Area>,
}

#[derive(Debug)]
struct Area {
    base: GuestAddress,
    len: usize,
    permissions: Permissions,
    start: NonNull<u8>,
    /// Keeps the mapping, whatever made it.
    _mapping: Box<dyn Any>,
}

impl RingMemory {
    /// An area of `len` bytes at `start`, which the guest knows as `base`.
    ///
    /// # Safety
    ///
    /// The `len` bytes from `start` must stay mapped, with at least `permissions`, until `mapping` is
    /// dropped, and whoever else uses them must use volatile or atomic accesses.
    pub(crate) unsafe fn new(
        base: GuestAddress,
        start: NonNull<u8>,
        len: usize,
        permissions: Permissions,
        mapping: Box<dyn Any>,
    ) -> Self {
        Self {
            areas: vec![Area {
                base,
                len,
                permissions,
                start,
                _mapping: mapping,
            }],
        }
    }

    /// All areas of both. Where areas overlap, an access uses the first that covers and permits it.
    pub fn join(mut self, other: Self) -> Self {
        self.areas.extend(other.areas);
        self
    }

    fn slice(
        &self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<VolatileSlice<'_>> {
        self.areas
            .iter()
            .find_map(|area| area.slice(address, count, access))
            .ok_or(Error::InvalidGuestAddress(address))
    }
}

impl Area {
    fn slice(
        &self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(address.0.checked_sub(self.base.0)?).ok()?;
        if offset.checked_add(count)? > self.len || !self.permissions.allow(access) {
            return None;
        }
        // SAFETY: offset + count <= len, checked above, and `new` promised len bytes for as long as the
        // area lives; the slice borrows it. Both sides use volatile accesses.
        Some(unsafe { VolatileSlice::new(self.start.as_ptr().add(offset), count) })
    }
}

impl GuestMemory for RingMemory {
    /// Not used: ring memory is no physical address space.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        self.slice(address, count, access).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        let slice = if count == 0 {
            None
        } else {
            Some(self.slice(address, count, access)?)
        };
        Ok(OneSlice(slice))
    }
}

/// An access lies in one area, so there is at most one slice.
struct OneSlice<'a>(Option<VolatileSlice<'a>>);

impl<'a> Iterator for OneSlice<'a> {
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl std::iter::FusedIterator for OneSlice<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for OneSlice<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn area(base: u64, len: usize, permissions: Permissions) -> RingMemory {
        let memory = vm_memory::MmapRegion::<()>::new(len).unwrap();
        let start = NonNull::new(memory.as_ptr()).unwrap();
        // SAFETY: the region is kept by the area and is `len` bytes long.
        unsafe {
            RingMemory::new(
                GuestAddress(base),
                start,
                len,
                permissions,
                Box::new(memory),
            )
        }
    }

    #[test]
    fn an_access_lies_within_one_area_or_fails() {
        let memory =
            area(0x1000, 64, Permissions::ReadWrite).join(area(0x1040, 64, Permissions::ReadWrite));
        memory.write_obj(7u64, GuestAddress(0x1038)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1038)).unwrap(), 7);
        for address in [0xff8u64, 0x103c, 0x1079, u64::MAX] {
            assert!(
                memory.read_obj::<u64>(GuestAddress(address)).is_err(),
                "{address:#x}"
            );
        }
    }

    #[test]
    fn a_read_only_area_cannot_be_written() {
        let memory = area(0, 64, Permissions::Read);
        assert!(memory.read_obj::<u8>(GuestAddress(0)).is_ok());
        assert!(memory.write_obj(1u8, GuestAddress(0)).is_err());
    }
}
