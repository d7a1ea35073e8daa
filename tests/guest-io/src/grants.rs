//! In dom0: what copying by grant costs against mapping, by size, on pages that dom0 grants to itself.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Instant;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};
use xen_virtio_guest_mapping::xen::{Domid, GrantAccess};
use xen_virtio_guest_mapping::{BusAddress, CopyOp, Direction, Gref, GuestAccess, PAGE_SIZE, Page};

const TIMES: u32 = 200;
const MOST: usize = 64;

/// `struct ioctl_gntalloc_alloc_gref` (`linux/xen/gntalloc.h`), with room for [`MOST`] references.
#[repr(C)]
struct AllocGref {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    references: [u32; MOST],
}

/// `IOCTL_GNTALLOC_ALLOC_GREF`: no direction, type `G`, number 5, size of the structure with one reference.
const ALLOC_GREF: libc::c_ulong = 24 << 16 | (b'G' as libc::c_ulong) << 8 | 5;
const GNTALLOC_FLAG_WRITABLE: u16 = 1;

/// Prints, for each size, microseconds for a copy and for a mapping that is read and unmapped again.
pub(crate) fn run() -> Result<()> {
    let open = |path: &str| {
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.with_context(|| path.to_owned())
    };
    let gntalloc = open("/dev/xen/gntalloc")?;
    let mut access = GrantAccess::new(Rc::new(open("/dev/xen/gntdev")?), Domid(0));
    let first = allocate(&gntalloc)?;
    let mut bytes = vec![0; MOST * PAGE_SIZE];
    for pages in [1, 4, 16, MOST] {
        let len = pages * PAGE_SIZE;
        let began = Instant::now();
        for _ in 0..TIMES {
            let mut operations = [CopyOp::new(Direction::FromGuest, first, 0..len)];
            access.copy(&VolatileSlice::from(&mut bytes[..]), &mut operations);
            operations[0].result?;
        }
        let copied = began.elapsed();
        let began = Instant::now();
        for _ in 0..TIMES {
            let ring = access.map_ring(first, len, Permissions::Read)?;
            // Each page is touched, as any use of it does.
            for page in 0..pages {
                let address = GuestAddress(first.0 + (page * PAGE_SIZE) as u64);
                vm_memory::Bytes::read_obj::<u64>(&ring, address)?;
            }
        }
        let mapped = began.elapsed();
        let each = |time: std::time::Duration| time.as_micros() / u128::from(TIMES);
        println!(
            "{} KiB: copy {} us, map {} us",
            len >> 10,
            each(copied),
            each(mapped)
        );
    }
    Ok(())
}

/// Grants [`MOST`] pages of this domain to itself; the address of the first.
fn allocate(gntalloc: &File) -> Result<GuestAddress> {
    let mut request = AllocGref {
        domid: 0,
        flags: GNTALLOC_FLAG_WRITABLE,
        count: MOST.try_into()?,
        index: 0,
        references: [0; MOST],
    };
    // SAFETY: the kernel fills `count` references, for which there is room.
    Errno::result(unsafe { libc::ioctl(gntalloc.as_raw_fd(), ALLOC_GREF as _, &raw mut request) })?;
    ensure!(
        request
            .references
            .windows(2)
            .all(|pair| pair[1] == pair[0] + 1),
        "the references are not consecutive: run it earlier after boot"
    );
    let page = Page::Grant(Gref(request.references[0]));
    Ok(BusAddress { page, offset: 0 }.into())
}
