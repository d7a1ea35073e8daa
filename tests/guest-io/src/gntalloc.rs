//! Pages that this domain grants to another one (`/dev/xen/gntalloc`).

use anyhow::{Context, Result};
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use xen_virtio_guest_mapping::xen::Mapping;
use xen_virtio_guest_mapping::{BusAddress, Gref, GuestAddress, PAGE_SIZE, Page, Permissions};

/// Pages of one allocation, at most.
pub const MOST: usize = 64;

/// `struct ioctl_gntalloc_alloc_gref` (`linux/xen/gntalloc.h`), with room for [`MOST`] references.
#[repr(C)]
struct AllocGref {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    references: [u32; MOST],
}

/// `struct ioctl_gntalloc_dealloc_gref`.
#[repr(C)]
struct DeallocGref {
    index: u64,
    count: u32,
}

/// `IOCTL_GNTALLOC_ALLOC_GREF`: no direction, type `G`, number 5, size of the structure with one reference.
const ALLOC_GREF: libc::c_ulong = 24 << 16 | (b'G' as libc::c_ulong) << 8 | 5;
/// `IOCTL_GNTALLOC_DEALLOC_GREF`.
const DEALLOC_GREF: libc::c_ulong = 16 << 16 | (b'G' as libc::c_ulong) << 8 | 6;
const GNTALLOC_FLAG_WRITABLE: u16 = 1;

/// An open `/dev/xen/gntalloc`.
#[derive(Clone)]
pub struct Gntalloc(Arc<File>);

/// Pages that are granted until this is dropped.
pub struct GrantedPages {
    /// Unmapped before the grants are ended, which the kernel leaves alone while they are mapped.
    mapping: Option<Mapping>,
    gntalloc: Gntalloc,
    index: u64,
    references: Vec<u32>,
}

// SAFETY: the mapping is memory that is only accessed as volatile slices and atomics.
unsafe impl Send for GrantedPages {}

impl Gntalloc {
    /// # Errors
    ///
    /// If the kernel has no such device.
    pub fn open() -> Result<Self> {
        let path = "/dev/xen/gntalloc";
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self(Arc::new(file.context(path)?)))
    }

    /// Grants `pages` zeroed pages, at most [`MOST`], to domain 0.
    ///
    /// # Errors
    ///
    /// The kernel's: it gives away 1024 pages.
    pub fn allocate(&self, pages: usize, writable: bool) -> Result<GrantedPages> {
        let mut request = AllocGref {
            domid: 0,
            flags: if writable { GNTALLOC_FLAG_WRITABLE } else { 0 },
            count: pages.min(MOST).try_into()?,
            index: 0,
            references: [0; MOST],
        };
        // SAFETY: the kernel fills `count` references, for which there is room.
        let called = unsafe { libc::ioctl(self.0.as_raw_fd(), ALLOC_GREF as _, &raw mut request) };
        Errno::result(called).context("granting pages")?;
        let mut granted = GrantedPages {
            mapping: None,
            gntalloc: self.clone(),
            index: request.index,
            references: request.references[..pages].to_vec(),
        };
        let (offset, len) = (request.index.try_into()?, pages * PAGE_SIZE);
        granted.mapping = Some(Mapping::new(&self.0, offset, len, Permissions::ReadWrite)?);
        Ok(granted)
    }
}

impl GrantedPages {
    pub fn mapping(&self) -> &Mapping {
        self.mapping.as_ref().expect("mapped until it is dropped")
    }

    /// The references, one a page.
    pub fn references(&self) -> &[u32] {
        &self.references
    }

    /// The address of the first page, as grant-mode devices know it.
    pub fn address(&self) -> GuestAddress {
        let page = Page::Grant(Gref(self.references[0]));
        BusAddress { page, offset: 0 }.into()
    }
}

impl Drop for GrantedPages {
    fn drop(&mut self) {
        self.mapping = None;
        let request = DeallocGref {
            index: self.index,
            count: self.references.len().try_into().expect("at most MOST"),
        };
        // SAFETY: the kernel reads the request. It fails for what was never allocated only.
        let _ = unsafe {
            libc::ioctl(
                self.gntalloc.0.as_raw_fd(),
                DEALLOC_GREF as _,
                &raw const request,
            )
        };
    }
}
