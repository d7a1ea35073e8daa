//! The memory that a back-end maps.

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::PAGE_SIZE;

/// What the region's length is a multiple of: SPDK maps huge pages.
const ALIGNMENT: usize = 2 << 20;

/// Where the rings of one queue are, in bytes from the region's beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingPlaces {
    /// Entries in each of the three areas.
    pub size: u16,
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
}

/// Shadow rings, and behind them a pool for data, in a memfd whose size nobody can change.
pub struct Region {
    memory: MmapRegion<()>,
    /// Its file's number.
    name: u64,
    rings: Vec<RingPlaces>,
    pool: Range<usize>,
}

/// What nobody changes of its file.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// What is where in a region.
struct Layout {
    rings: Vec<RingPlaces>,
    pool: Range<usize>,
    bytes: usize,
}

impl Layout {
    fn of(sizes: &[u16], pool: usize) -> Self {
        let mut end = 0;
        let mut place = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(PAGE_SIZE);
            start
        };
        let mut rings = Vec::with_capacity(sizes.len());
        for &size in sizes {
            let entries = usize::from(size);
            // Sizes: virtio 1.3, 2.7.
            rings.push(RingPlaces {
                size,
                descriptors: place(16 * entries),
                available: place(6 + 2 * entries),
                used: place(6 + 8 * entries),
            });
        }
        let start = place(pool);
        Self {
            rings,
            pool: start..start + pool.next_multiple_of(PAGE_SIZE),
            bytes: end.next_multiple_of(ALIGNMENT),
        }
    }
}

/// A file for a region of queues of `sizes` entries, and a pool of `pool` bytes, whose size nobody can change.
///
/// # Errors
///
/// The system's.
pub(crate) fn region_file(sizes: &[u16], pool: usize) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("xen-virtio-shadow", flags)?;
    ftruncate(&file, Layout::of(sizes, pool).bytes as u64)?;
    // A back-end that shrank it would kill whoever reads it next.
    fcntl_add_seals(&file, SEALS)?;
    Ok(file)
}

fn check(file: &OwnedFd, layout: &Layout) -> io::Result<()> {
    let is_sealed = fcntl_get_seals(file)?.contains(SEALS);
    let has_all = usize::try_from(fstat(file)?.st_size).is_ok_and(|bytes| layout.bytes <= bytes);
    match is_sealed && has_all {
        true => Ok(()),
        false => Err(io::Error::other("the memory is none of a region like this")),
    }
}

impl Region {
    /// A region of zeros with queues of `sizes` entries, and a pool of `pool` bytes. Pages of the pool that nobody touches take no
    /// memory.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(sizes: &[u16], pool: usize) -> io::Result<Self> {
        Self::begin(region_file(sizes, pool)?, sizes, pool)
    }

    /// A region of such queues and pool in `file`, which is one for as many queues or more that nobody has used.
    ///
    /// # Errors
    ///
    /// If it is none, or the system has not the memory.
    pub fn begin(file: OwnedFd, sizes: &[u16], pool: usize) -> io::Result<Self> {
        let layout = Layout::of(sizes, pool);
        let rings = u64::try_from(layout.pool.start).expect("a length in memory");
        check(&file, &layout)?;
        // An access for which there is no memory kills who makes it: of the rings we have it now.
        fallocate(&file, FallocateFlags::empty(), 0, rings)?;
        Self::map(file, layout)
    }

    /// The region of such queues and pool that an earlier process has made in `file`.
    ///
    /// # Errors
    ///
    /// If it is none.
    pub fn left(file: OwnedFd, sizes: &[u16], pool: usize) -> io::Result<Self> {
        let layout = Layout::of(sizes, pool);
        check(&file, &layout)?;
        Self::map(file, layout)
    }

    fn map(file: OwnedFd, layout: Layout) -> io::Result<Self> {
        let Layout { rings, pool, bytes } = layout;
        let name = fstat(&file)?.st_ino;
        let memory = MmapRegion::from_file(FileOffset::new(File::from(file), 0), bytes)
            .map_err(io::Error::other)?;
        Ok(Self {
            memory,
            name,
            rings,
            pool,
        })
    }

    /// An empty region of the same queues and pool.
    ///
    /// # Errors
    ///
    /// As [`Region::new`].
    pub(super) fn another(&self) -> io::Result<Self> {
        let sizes: Vec<u16> = self.rings.iter().map(|ring| ring.size).collect();
        Self::new(&sizes, self.pool.len())
    }

    /// What the back-end is to map, from its beginning to its end.
    pub fn file(&self) -> &File {
        let file = self.memory.file_offset().expect("it is of a file");
        file.file()
    }

    /// What tells it from others that there are.
    pub(super) fn name(&self) -> u64 {
        self.name
    }

    /// Bytes, a multiple of 2 MiB.
    pub fn bytes(&self) -> usize {
        self.memory.size()
    }

    /// By queue.
    pub fn rings(&self) -> &[RingPlaces] {
        &self.rings
    }

    pub(super) fn pool(&self) -> Range<usize> {
        self.pool.clone()
    }

    pub fn memory(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_and_apart() {
        let region = Region::new(&[1024, 2], 3 * PAGE_SIZE + 1).unwrap();
        let mut areas = Vec::new();
        for ring in region.rings() {
            let entries = usize::from(ring.size);
            areas.push((ring.descriptors, 16 * entries));
            areas.push((ring.available, 6 + 2 * entries));
            areas.push((ring.used, 6 + 8 * entries));
        }
        areas.push((region.pool().start, region.pool().len()));
        assert!(
            areas
                .windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        );
        assert!(
            areas
                .iter()
                .all(|(start, _)| start.is_multiple_of(PAGE_SIZE))
        );
        assert_eq!(region.pool().len(), 4 * PAGE_SIZE);
        assert!(region.pool().end <= region.bytes());
    }

    #[test]
    fn nobody_changes_its_size() {
        let region = Region::new(&[8], PAGE_SIZE).unwrap();
        for bytes in [0, region.bytes() as u64 * 2] {
            assert!(region.file().set_len(bytes).is_err());
        }
    }
}
