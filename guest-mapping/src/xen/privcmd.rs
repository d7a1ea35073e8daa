//! Access by frame number, for guests that grant nothing (`/dev/xen/privcmd`).

use super::abi;
use super::frame_cache::FrameCache;
use super::{Domid, Mapping};
use crate::access::{AccessCounters, AccessError, CopyFault, CopyOp, Direction, GuestAccess};
use crate::address::Page;
use crate::provider::{Piece, admit_pieces, part, ring_segments};
use crate::ring::MappedPages;
use crate::{AddressMode, Gfn, PAGE_SIZE, Policy, RingMemory, syscalls};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

const POLICY: Policy = Policy {
    mode: AddressMode::Frames,
};

/// An open `/dev/xen/privcmd`, for one guest.
#[derive(Debug)]
pub struct Privcmd {
    file: File,
    domid: Domid,
}

impl Privcmd {
    /// Restricts `file`, an open `/dev/xen/privcmd`, to `domid` for good: no other domain can be touched
    /// through it any more, whoever has it.
    ///
    /// # Errors
    ///
    /// The kernel's, for a file that is not privcmd or is restricted to another domain already.
    pub fn restrict(file: &File, domid: Domid) -> io::Result<()> {
        // SAFETY: the kernel reads a domid.
        unsafe { abi::privcmd_restrict(file.as_raw_fd(), &raw const domid.0) }?;
        Ok(())
    }

    /// `file` is restricted to `domid`.
    pub fn new(file: File, domid: Domid) -> Self {
        Self { file, domid }
    }

    pub fn domid(&self) -> Domid {
        self.domid
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Maps the page of an ioreq server that holds the vCPUs' requests (`XENMEM_acquire_resource`).
    ///
    /// # Errors
    ///
    /// The kernel's or Xen's: no such server, or the domain is gone.
    pub fn map_ioreq_page(&self, server: u16) -> io::Result<Mapping> {
        let mapping = Mapping::new(&self.file, 0, PAGE_SIZE, Permissions::ReadWrite)?;
        let mut request = abi::PrivcmdMmapResource {
            dom: self.domid.0,
            kind: abi::RESOURCE_IOREQ_SERVER,
            id: server.into(),
            idx: abi::IOREQ_SERVER_FRAME_IOREQ,
            num: 1,
            addr: mapping.start().as_ptr() as u64,
        };
        // SAFETY: the kernel puts one page where `mapping` reserved one.
        unsafe { abi::privcmd_mmap_resource(self.file.as_raw_fd(), &raw mut request) }?;
        Ok(mapping)
    }

    /// Maps guest frames side by side. A frame that could not be mapped has its errno in the second
    /// result, and touching its page raises SIGBUS: it must not be used.
    fn map_frames(
        &self,
        frames: &[Gfn],
        permissions: Permissions,
    ) -> io::Result<(Mapping, Vec<i32>)> {
        let mapping = Mapping::new(&self.file, 0, frames.len() * PAGE_SIZE, permissions)?;
        let numbers: Vec<xen_sys::xen_pfn_t> = frames.iter().map(|Gfn(gfn)| *gfn as _).collect();
        let mut errors = vec![0; frames.len()];
        let mut request = abi::PrivcmdMmapbatchV2 {
            num: frames.len().try_into().map_err(io::Error::other)?,
            dom: self.domid.0,
            addr: mapping.start().as_ptr() as u64,
            arr: numbers.as_ptr(),
            err: errors.as_mut_ptr(),
        };
        syscalls::count();
        // SAFETY: `arr` and `err` have `num` elements each, and `mapping` as many pages.
        let called = unsafe { abi::privcmd_mmapbatch_v2(self.file.as_raw_fd(), &raw mut request) };
        match called {
            Err(errno) if errors.iter().all(|&error| error == 0) => Err(errno.into()),
            _ => Ok((mapping, errors.into_iter().map(|error| -error).collect())),
        }
    }
}

/// The frames of one guest, mapped when a descriptor first names them.
pub struct FrameAccess {
    privcmd: Rc<Privcmd>,
    ring_frames: Rc<Cell<u64>>,
    cache: Rc<RefCell<FrameCache>>,
    counters: AccessCounters,
    pieces: Vec<Piece>,
}

impl FrameAccess {
    /// Access for one device of the guest; `cache` is shared by all of them.
    pub fn new(privcmd: Rc<Privcmd>, cache: Rc<RefCell<FrameCache>>) -> Self {
        Self {
            privcmd,
            ring_frames: Rc::default(),
            cache,
            counters: AccessCounters::default(),
            pieces: Vec::new(),
        }
    }
}

impl GuestAccess for FrameAccess {
    fn map_ring(
        &mut self,
        address: GuestAddress,
        len: usize,
        permissions: Permissions,
    ) -> Result<RingMemory, AccessError> {
        let segments = ring_segments(POLICY, &mut self.counters, address, len)?;
        let frames: Vec<Gfn> = segments.iter().map(|segment| gfn(segment.page)).collect();
        let failed = |source| AccessError::Map {
            address: address.0,
            len,
            source,
        };
        let (mapping, errors) = self
            .privcmd
            .map_frames(&frames, permissions)
            .map_err(failed)?;
        if let Some(&errno) = errors.iter().find(|&&errno| errno != 0) {
            return Err(failed(io::Error::from_raw_os_error(errno)));
        }
        let held = Box::new(Counted::new(
            mapping,
            frames.len() as u64,
            &self.ring_frames,
        ));
        Ok(RingMemory::new(
            address,
            held,
            segments[0].offset,
            len,
            permissions,
        ))
    }

    fn copy(&mut self, buffer: &VolatileSlice<'_>, operations: &mut [CopyOp]) {
        admit_pieces(POLICY, &mut self.counters, operations, &mut self.pieces);
        let mut cache = self.cache.borrow_mut();
        let map = |frames: &[Gfn]| self.privcmd.map_frames(frames, Permissions::ReadWrite);
        for piece in &self.pieces {
            let gfn = gfn(piece.segment.page);
            match cache.page(gfn, map) {
                Ok((mapping, page)) => {
                    let guest = mapping.slice(page + piece.segment.offset, piece.segment.len);
                    let ours = part(buffer, piece.local.clone());
                    match piece.direction {
                        Direction::FromGuest => guest.copy_to_volatile_slice(ours),
                        Direction::ToGuest => ours.copy_to_volatile_slice(guest),
                    }
                }
                Err(errno) => operations[piece.owner].result = Err(CopyFault::Frame { gfn, errno }),
            }
        }
    }

    fn make_room(&mut self) -> bool {
        self.cache.borrow_mut().clear()
    }

    fn invalidate(&mut self) {
        self.cache.borrow_mut().clear();
    }

    fn mode(&self) -> AddressMode {
        POLICY.mode
    }

    fn counters(&self) -> AccessCounters {
        let frames_mapped = self.ring_frames.get() + self.cache.borrow().pages() as u64;
        AccessCounters {
            frames_mapped,
            ..self.counters
        }
    }
}

/// A mapping that is counted while it lives.
struct Counted {
    mapping: Mapping,
    pages: u64,
    count: Rc<Cell<u64>>,
}

impl Counted {
    fn new(mapping: Mapping, pages: u64, count: &Rc<Cell<u64>>) -> Self {
        count.set(count.get() + pages);
        Self {
            mapping,
            pages,
            count: Rc::clone(count),
        }
    }
}

impl MappedPages for Counted {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.mapping.slice(offset, len)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.set(self.count.get() - self.pages);
    }
}

fn gfn(page: Page) -> Gfn {
    match page {
        Page::Frame(gfn) => gfn,
        Page::Grant(_) => unreachable!("the policy for frames admits no grant"),
    }
}
