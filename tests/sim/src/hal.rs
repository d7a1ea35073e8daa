//! The memory of a simulated guest, as the `virtio-drivers` crate asks for it: as Linux's xen-grant-dma
//! does, every buffer is granted for as long as the device may use it.

use crate::memory::SimMemory;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use xen_virtio_guest_mapping::{AddressMode, BusAddress, Gfn, Gref, GuestAddress, Page};

thread_local! {
    /// The guest whose driver this thread runs: the crate's trait has no receiver to keep it in.
    static PLATFORM: RefCell<Option<Platform>> = const { RefCell::new(None) };
}

struct Platform {
    memory: SimMemory,
    mode: AddressMode,
    buffers: HashMap<PhysAddr, Buffer>,
}

/// Guest memory that the device may use.
struct Buffer {
    gfn: Gfn,
    pages: usize,
    grant: Option<Gref>,
}

/// See the module.
pub struct SimHal;

impl SimHal {
    /// Makes this thread's drivers those of the guest with `memory`, naming it as `mode` says.
    pub fn install(memory: SimMemory, mode: AddressMode) {
        PLATFORM.set(Some(Platform {
            memory,
            mode,
            buffers: HashMap::new(),
        }));
    }

    fn with<T>(action: impl FnOnce(&mut Platform) -> T) -> T {
        PLATFORM.with_borrow_mut(|platform| {
            action(platform.as_mut().expect("SimHal::install comes first"))
        })
    }
}

impl Platform {
    /// Memory for `len` bytes, and the address that the device knows it by.
    fn allocate(&mut self, len: usize, writable: bool) -> Option<(PhysAddr, NonNull<u8>)> {
        let pages = len.div_ceil(PAGE_SIZE);
        let gfn = self.memory.allocate(pages)?;
        let grant =
            (self.mode == AddressMode::Grants).then(|| self.memory.grant(gfn, pages, writable));
        let page = grant.map_or(Page::Frame(gfn), Page::Grant);
        let GuestAddress(address) = BusAddress { page, offset: 0 }.into();
        let start = NonNull::new(self.memory.memory(gfn, len)?.ptr_guard_mut().as_ptr())?;
        self.buffers.insert(address, Buffer { gfn, pages, grant });
        Some((address, start))
    }

    fn free(&mut self, address: PhysAddr) {
        let Buffer { gfn, pages, grant } = self
            .buffers
            .remove(&address)
            .expect("freed once, as allocated");
        if let Some(reference) = grant {
            self.memory.revoke(reference, pages);
        }
        self.memory.free(gfn, pages);
    }
}

// SAFETY: dma_alloc gives page-aligned, zeroed memory of the guest's own, which nobody else has until it is
// freed; share copies, so that the caller's buffer is never the device's.
unsafe impl Hal for SimHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        SimHal::with(|platform| platform.allocate(pages * PAGE_SIZE, true))
            .unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(address: PhysAddr, _start: NonNull<u8>, _pages: usize) -> i32 {
        SimHal::with(|platform| platform.free(address));
        0
    }

    unsafe fn mmio_phys_to_virt(_address: PhysAddr, _len: usize) -> NonNull<u8> {
        unreachable!("only for PCI")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        // SAFETY: the caller promises a valid buffer that nobody writes meanwhile.
        let bytes = unsafe { buffer.as_ref() };
        SimHal::with(|platform| {
            let writable = direction != BufferDirection::DriverToDevice;
            let (address, _) = platform
                .allocate(bytes.len(), writable)
                .expect("the simulated guest has memory");
            let place = platform
                .memory
                .memory(platform.buffers[&address].gfn, bytes.len());
            place.expect("just allocated").copy_from(bytes);
            address
        })
    }

    unsafe fn unshare(address: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        SimHal::with(|platform| {
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: the caller promises a valid buffer that nobody else uses meanwhile.
                let bytes = unsafe { buffer.as_mut() };
                let place = platform
                    .memory
                    .memory(platform.buffers[&address].gfn, bytes.len());
                place.expect("shared before").copy_to(bytes);
            }
            platform.free(address);
        });
    }
}
