//! The process that serves a guest dies at every step of what it does, and another one takes over: nothing
//! is lost, nothing is done twice, and the driver notices nothing.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_sim::SimGuest;
use xen_virtio_tests::{
    BlkRequest, Driver, MakeDevice, Random, RawQueue, allow_descriptors, drive_over_deaths, driver,
    wait_for_all,
};
use xen_virtio_transport::Register;

const SIZE: u16 = 32;
const BLOCK: usize = 4096;
/// Requests that are made available at once.
const TOGETHER: u16 = 3;

/// Offers `requests` together, and waits for all of them.
fn perform(
    guest: &SimGuest,
    driver: &Driver,
    queue: &mut RawQueue,
    offered: &mut u16,
    requests: &[BlkRequest],
) {
    let mut heads = Vec::new();
    for (request, head) in requests.iter().zip((0..).step_by(3)) {
        request.describe(queue, head);
        queue.offer(head);
        heads.push(head);
        *offered += 1;
    }
    driver.notify(0);
    wait_for_all(guest, queue, *offered, &heads);
    for request in requests {
        assert_eq!(request.status.read(), [0]);
    }
}

fn content(round: u8, index: u16) -> Vec<u8> {
    vec![round * 16 + u8::try_from(index).unwrap() + 1; BLOCK]
}

/// What the driver does: everything that happens between a device and its driver, twice.
fn drive(guest: &SimGuest, disk: &Path) {
    let driver = driver(guest, 0);
    for round in 0..2 {
        let mut queue = driver.start(SIZE);
        let mut offered = 0;
        let request = |kind, index: u16, len, reads| {
            BlkRequest::new(&driver, kind, u64::from(index) * 8, len, reads)
        };
        let writes: Vec<_> = (0..TOGETHER)
            .map(|index| {
                let write = request(VIRTIO_BLK_T_OUT, index, BLOCK, false);
                write.data.write(0, &content(round, index));
                write
            })
            .collect();
        perform(guest, &driver, &mut queue, &mut offered, &writes);
        let flush = [request(VIRTIO_BLK_T_FLUSH, 0, 0, false)];
        perform(guest, &driver, &mut queue, &mut offered, &flush);
        let on_disk = std::fs::read(disk).unwrap();
        for index in 0..TOGETHER {
            let start = usize::from(index) * BLOCK;
            assert_eq!(on_disk[start..start + BLOCK], content(round, index));
        }
        let reads: Vec<_> = (0..TOGETHER)
            .map(|index| request(VIRTIO_BLK_T_IN, index, BLOCK, true))
            .collect();
        perform(guest, &driver, &mut queue, &mut offered, &reads);
        for (read, index) in reads.iter().zip(0..) {
            assert_eq!(read.data.read(), content(round, index));
        }
        assert!(!driver.needs_reset());
        driver.write(Register::Status, 0);
        assert_eq!(driver.read(Register::Status), 0);
    }
}

/// Drives a device whose process dies at the first step of `deaths`, the process that follows it at the second of them,
/// counted from its own beginning, and so on. How many have died.
fn dies_at(deaths: &[u64]) -> usize {
    dies_without_memory_at(deaths, 0)
}

/// As [`dies_at`], and dom0 has no memory for the first `maps` mappings of rings of each process that follows.
fn dies_without_memory_at(deaths: &[u64], maps: u32) -> usize {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let path = disk.path().to_owned();
    let make: Arc<MakeDevice> = Arc::new(move |records| {
        let disk = Disk::open(&path, false).unwrap();
        let kept = records.own(0, Blk::KEPT).unwrap();
        Box::new(Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap())
    });
    let path = disk.path().to_owned();
    drive_over_deaths(deaths, maps, &make, move |guest| drive(guest, &path))
}

/// Dies at step `first` and every other one after it. The last one that there was.
fn die_at_every_other(first: u64) -> u64 {
    // How many steps there are depends on how the threads meet: until it ends well without a death, often.
    let (mut step, mut without) = (first, 0);
    while without < 10 {
        without = if dies_at(&[step]) > 0 { 0 } else { without + 1 };
        step += 2;
    }
    step
}

#[test]
fn a_death_at_any_step_is_not_noticed() {
    allow_descriptors();
    // One thread for the odd steps, and one for the even.
    let halves = [1, 2].map(|first| thread::spawn(move || die_at_every_other(first)));
    for half in halves {
        let last = half.join().unwrap();
        assert!(last > 300, "only {last} steps");
    }
}

/// What the dead process completed and did not show is shown when there is memory, and the driver is told.
#[test]
fn a_takeover_without_memory_is_not_noticed() {
    allow_descriptors();
    // Before those a device's state is set up.
    let died: usize = (400..1100)
        .step_by(3)
        .map(|step| dies_without_memory_at(&[step], 2))
        .sum();
    assert!(died > 150, "only {died} deaths");
}

/// The process that takes over dies too, at each of its first steps, after a death at some step of the first.
#[test]
fn a_second_death_in_the_takeover_is_not_noticed() {
    /// Steps from a process's beginning to the end of a few requests.
    const TAKEOVER: u64 = 120;
    allow_descriptors();
    let seed = 0x6465_6174;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    let mut both = 0;
    for second in 1..=TAKEOVER {
        // Most of those before 400 set up a device's state.
        let first = 300 + random.below(700) as u64;
        both += u32::from(dies_at(&[first, second]) == 2);
    }
    assert!(both > 100, "only {both} second deaths");
}
