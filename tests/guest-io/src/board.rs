//! The driver's platform in a Linux guest: the device's page through `/dev/mem`, memory from gntalloc.
//!
//! The kernel's own driver must have let go of the device.

use crate::gntalloc::{Gntalloc, GrantedPages};
use crate::platform::{GrantedMemory, Platform};
use anyhow::{Context, Result, ensure};
use std::fs::OpenOptions;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use vm_memory::{VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::xen::Mapping;
use xen_virtio_guest_mapping::{PAGE_SIZE, Permissions};
use xen_virtio_transport::Width;

/// Where an Arm guest's memory begins (`GUEST_RAM0_BASE`).
const SOME_FRAME: u64 = 0x4000_0000;

/// A device's page, and where its driver gets memory.
pub struct BoardDevice {
    page: Mapping,
    offset: usize,
    gntalloc: Gntalloc,
}

// SAFETY: the page is only accessed as atomics.
unsafe impl Send for BoardDevice {}
// SAFETY: as above.
unsafe impl Sync for BoardDevice {}

impl BoardDevice {
    /// The device at guest-physical address `base`.
    ///
    /// # Errors
    ///
    /// If this is not root in a guest whose kernel has both devices.
    pub fn open(base: u64) -> Result<Self> {
        let path = "/dev/mem";
        let memory = OpenOptions::new().read(true).write(true).open(path);
        let offset = usize::try_from(base)? % PAGE_SIZE;
        ensure!(
            offset.is_multiple_of(0x200),
            "{base:#x} is no device's page"
        );
        let start = i64::try_from(base)? - i64::try_from(offset)?;
        Ok(Self {
            page: Mapping::new(
                &memory.context(path)?,
                start,
                PAGE_SIZE,
                Permissions::ReadWrite,
            )?,
            offset,
            gntalloc: Gntalloc::open()?,
        })
    }

    /// The access's bytes: one aligned load or store each, as a register wants it.
    fn slice(&self, offset: u64, width: Width) -> VolatileSlice<'_> {
        let offset = usize::try_from(offset).expect("within the page");
        self.page.slice(self.offset + offset, width.bytes())
    }
}

impl Platform for BoardDevice {
    fn read(&self, offset: u64, width: Width) -> u64 {
        let slice = self.slice(offset, width);
        let aligned = "drivers access aligned registers";
        let order = Ordering::Relaxed;
        match width {
            Width::One => slice
                .get_atomic_ref::<AtomicU8>(0)
                .expect(aligned)
                .load(order)
                .into(),
            Width::Two => slice
                .get_atomic_ref::<AtomicU16>(0)
                .expect(aligned)
                .load(order)
                .into(),
            Width::Four => slice
                .get_atomic_ref::<AtomicU32>(0)
                .expect(aligned)
                .load(order)
                .into(),
            Width::Eight => slice
                .get_atomic_ref::<AtomicU64>(0)
                .expect(aligned)
                .load(order),
        }
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        let slice = self.slice(offset, width);
        let aligned = "drivers access aligned registers";
        let order = Ordering::Relaxed;
        let [one, two, ..] = value.to_le_bytes();
        let half = u32::try_from(value & u64::from(u32::MAX)).expect("32 bits");
        match width {
            Width::One => slice
                .get_atomic_ref::<AtomicU8>(0)
                .expect(aligned)
                .store(one, order),
            Width::Two => {
                let value = u16::from_le_bytes([one, two]);
                slice
                    .get_atomic_ref::<AtomicU16>(0)
                    .expect(aligned)
                    .store(value, order);
            }
            Width::Four => slice
                .get_atomic_ref::<AtomicU32>(0)
                .expect(aligned)
                .store(half, order),
            Width::Eight => slice
                .get_atomic_ref::<AtomicU64>(0)
                .expect(aligned)
                .store(value, order),
        }
    }

    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
        let pages = self
            .gntalloc
            .allocate(len.div_ceil(PAGE_SIZE), device_writes);
        Box::new(pages.expect("a guest that grants pages"))
    }
}

impl GrantedMemory for GrantedPages {
    fn address(&self) -> u64 {
        self.address().0
    }

    fn frame_address(&self) -> u64 {
        SOME_FRAME
    }

    fn slice(&self, len: usize) -> VolatileSlice<'_> {
        self.mapping().slice(0, len)
    }

    fn revoke(self: Box<Self>) {}
}
