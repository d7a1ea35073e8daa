//! In dom0: what copying by grant costs against mapping, by size, on pages that dom0 grants to itself.

use anyhow::{Context, Result, ensure};
use std::fs::OpenOptions;
use std::rc::Rc;
use std::time::Instant;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};
use xen_virtio_guest_io::gntalloc::{Gntalloc, MOST};
use xen_virtio_guest_mapping::xen::{Domid, GrantAccess};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess, PAGE_SIZE};

const TIMES: u32 = 200;

/// Prints, for each size, microseconds for a copy and for a mapping that is read and unmapped again.
pub(crate) fn run() -> Result<()> {
    let path = "/dev/xen/gntdev";
    let gntdev = OpenOptions::new().read(true).write(true).open(path);
    let mut access = GrantAccess::new(Rc::new(gntdev.context(path)?), Domid(0));
    let granted = Gntalloc::open()?.allocate(MOST, true)?;
    ensure!(
        granted
            .references()
            .windows(2)
            .all(|pair| pair[1] == pair[0] + 1),
        "the references are not consecutive: run it earlier after boot"
    );
    let first = granted.address();
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
