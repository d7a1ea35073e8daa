//! Disks that hang, and those that are not ours yet.

use super::*;
use crate::blk::SECTOR;
use rustix::pipe::pipe;
use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::rc::Rc;
use std::time::Duration;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;
use xen_virtio_guest_mapping::{AddressMode, BusAddress, Gref, GuestAddress, PAGE_SIZE, Page};
use xen_virtio_sim::SimMemory;

const BLOCK: u32 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[test]
fn nothing_is_begun_before_the_disk_is_ones_own() {
    let Some((mut pipeline, _other_end, _)) = hanging() else {
        return;
    };
    let is_free = Rc::new(Cell::new(false));
    let asked = Rc::clone(&is_free);
    pipeline.claim_first(Box::new(move || match asked.get() {
        true => Ok(()),
        false => Err("an earlier worker's transfers".into()),
    }));
    assert!(!pipeline.gather_ended());
    assert_eq!(pipeline.room(), 0);
    let said = pipeline.shortage().unwrap();
    assert!(said.contains("an earlier worker's transfers"), "{said}");
    assert!(pipeline.try_again_at().is_some());
    is_free.set(true);
    gather(&mut pipeline, |pipeline| pipeline.room() > 0);
    assert_eq!((pipeline.shortage(), pipeline.try_again_at()), (None, None));
}

/// A request of a simulated guest for the first block of the disk.
fn read(memory: &SimMemory) -> Request {
    let first = memory.allocate(3).unwrap();
    let header = memory.memory(first, 16).unwrap();
    header.write_obj(VIRTIO_BLK_T_IN.to_le(), 0).unwrap();
    let mut request = Request::new(0);
    let Gref(gref) = memory.grant(first, 3, true);
    for (page, len, flags) in [(0, 16, NEXT), (1, BLOCK, NEXT | WRITE), (2, 1, WRITE)] {
        let page = Page::Grant(Gref(gref + page));
        let GuestAddress(address) = BusAddress { page, offset: 0 }.into();
        request
            .add(Descriptor::new(address, len, flags, 0))
            .unwrap();
    }
    request
}

/// A pipeline whose disk is a pipe: a read of it takes as long as the other end says nothing.
fn hanging() -> Option<(Pipeline, File, StateArea)> {
    let (disk, other_end) = pipe().unwrap();
    let disk = Disk::of_pipe(disk.into(), 8 * u64::from(BLOCK) / SECTOR);
    let rings = RingStock::new(1);
    if rings.take().map(|ring| rings.give_back(ring)).is_none() {
        eprintln!("this kernel gives no io_uring with restrictions: no disk can hang");
        return None;
    }
    let kept = StateArea::private(crate::blk::Blk::KEPT).unwrap();
    let pipeline = Pipeline::new(disk, [0; 20], kept.clone(), &rings).unwrap();
    Some((pipeline, other_end.into(), kept))
}

/// Until `done`, at most for a while.
fn gather(pipeline: &mut Pipeline, done: impl Fn(&Pipeline) -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done(pipeline) {
        pipeline.gather_ended();
        assert!(Instant::now() < end, "nothing ended");
    }
}

#[test]
fn a_stop_waits_for_nothing_and_what_it_leaves_holds_back_the_next_driver() {
    let Some((mut pipeline, mut other_end, kept)) = hanging() else {
        return;
    };
    let memory = SimMemory::new(64).unwrap();
    let mut access = memory.access(AddressMode::Grants);
    let free = pipeline.pool.free_pages();
    for queue in [0, 0, 1] {
        pipeline.admit(queue, read(&memory), false).unwrap();
    }
    assert!(pipeline.copy_in(&mut access) && pipeline.submit());
    // One that was not begun is forgotten as well.
    pipeline.admit(0, read(&memory), false).unwrap();
    pipeline.forget(0);
    assert_eq!((pipeline.len(), pipeline.room()), (3, 0));
    assert!(!pipeline.is_settled());
    // The first word is that of writes which a flush has lost: none of the next driver's, whichever process it has.
    kept.store(0, 1);
    pipeline.reset();
    assert_eq!(kept.load(0), 0);
    // As a flush of the driver before does that fails late.
    kept.store(0, 1);
    // The first two reads are of the queue that was stopped, the third of the one that runs.
    other_end.write_all(&[7; 3 * BLOCK as usize]).unwrap();
    gather(&mut pipeline, |pipeline| pipeline.is_settled());
    assert_eq!(
        (pipeline.room(), kept.load(0)),
        (usize::from(MAX_REQUESTS) - 1, 0)
    );
    gather(&mut pipeline, Pipeline::has_ended);
    let mut completed = Vec::new();
    let delivered = pipeline.deliver(&mut access, |queue, request| {
        completed.push((queue, request.into_completion().written));
        Ok(())
    });
    delivered.unwrap();
    assert_eq!(completed, [(1, BLOCK + 1)]);
    assert_eq!((pipeline.len(), pipeline.pool.free_pages()), (0, free));
    assert!(free > 3 * BLOCK as usize / PAGE_SIZE);
}
