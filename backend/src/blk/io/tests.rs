//! Flushes, and what is known of those that failed.

use super::super::Blk;
use super::*;
use std::ops::Range;
use vm_memory::Bytes;

fn disk_io(bytes: &[u8], uring: bool) -> (tempfile::NamedTempFile, DiskIo) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let disk = Disk::open(file.path(), false).unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    let rings = RingStock::new(usize::from(uring));
    let io = DiskIo::new(disk, 1 << 16, kept, &rings).unwrap();
    (file, io)
}

fn transfer(id: u16, kind: Kind, offset: u64, place: Range<usize>) -> Transfer {
    Transfer {
        id,
        kind,
        offset,
        place,
    }
}

/// What everything in flight comes to.
fn results(io: &mut DiskIo) -> Vec<(u16, Option<usize>)> {
    let mut results = Vec::new();
    while io.in_flight() > 0 {
        io.submit();
        let ended = std::iter::from_fn(|| io.next_ended());
        results.extend(ended.map(|(id, result)| (id, result.ok())));
    }
    results.sort_unstable();
    results
}

#[test]
fn both_engines_move_bytes_and_tell_of_errors() {
    for uring in [true, false] {
        let (file, mut io) = disk_io(&[7; 8192], uring);
        io.memory().write_slice(&[9; 512], 4096).unwrap();
        io.begin(transfer(1, Kind::Write, 512, 4096..4608));
        io.begin(transfer(2, Kind::Read, 4096, 0..512));
        io.begin(transfer(3, Kind::Flush, 0, 0..0));
        io.begin(transfer(4, Kind::Read, 8192, 512..1024));
        io.submit();
        let expected = [(1, Some(512)), (2, Some(512)), (3, Some(0)), (4, Some(0))];
        assert_eq!(results(&mut io), expected, "uring {uring}");
        assert_eq!(io.in_flight(), 0);
        let mut read = [0; 512];
        io.memory().read_slice(&mut read, 0).unwrap();
        assert_eq!(read, [7; 512]);
        assert_eq!(std::fs::read(file.path()).unwrap()[512..1024], [9; 512]);
    }
}

#[test]
fn a_flush_after_a_failed_one_fails_until_a_new_driver_begins() {
    for uring in [true, false] {
        let (_file, mut io) = disk_io(&[0; 4096], uring);
        assert!(io.flush_error().is_none());
        io.flushing.push(4);
        io.in_flight += 1;
        io.end_flush(Err(io::Error::from_raw_os_error(libc::ENOSPC)));
        io.begin(transfer(5, Kind::Flush, 0, 0..0));
        io.begin(transfer(6, Kind::Read, 0, 0..512));
        assert_eq!(
            results(&mut io),
            [(4, None), (5, None), (6, Some(512))],
            "uring {uring}"
        );
        io.forget_lost_writes();
        io.begin(transfer(7, Kind::Flush, 0, 0..0));
        assert_eq!(results(&mut io), [(7, Some(0))], "uring {uring}");
        // The reason stays for whoever looks.
        let (error, holds) = io.flush_error().unwrap();
        assert_eq!((error.raw_os_error(), holds), (Some(libc::ENOSPC), false));
    }
}

#[test]
fn a_flush_of_what_cannot_be_dirty_succeeds() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let disk = Disk::open(file.path(), true).unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    kept.store(LOST_WRITES, 1);
    let mut io = DiskIo::new(disk, 1 << 16, kept, &RingStock::new(1)).unwrap();
    io.begin(transfer(1, Kind::Flush, 0, 0..0));
    assert_eq!(results(&mut io), [(1, Some(0))]);
}

#[test]
fn flushes_at_once_share_their_fate() {
    for uring in [true, false] {
        let (_file, mut io) = disk_io(&[0; 4096], uring);
        for id in 0..5 {
            io.begin(transfer(id, Kind::Flush, 0, 0..0));
        }
        // The first is in the kernel, and fails; those behind it must not succeed after it.
        assert_eq!((io.flushing.len(), io.flush_next.len()), (1, 4));
        io.end_flush(Err(io::ErrorKind::Other.into()));
        assert_eq!(io.ended.len(), 5);
        assert!(io.ended.iter().all(|(_, result)| result.is_err()));
        // What the kernel says of the one that was pushed concerns nobody any more.
        assert_eq!(results(&mut io).len(), 5);
    }
}

/// They may be another device's by then.
#[test]
fn a_disk_that_was_taken_away_leaves_its_words_alone() {
    let (_file, mut io) = disk_io(&[0; 4096], false);
    let kept = io.kept.clone().unwrap();
    io.retire();
    io.end_flush(Err(io::Error::from_raw_os_error(libc::EIO)));
    assert_eq!(kept.load(LOST_WRITES), 0);
    kept.store(LOST_WRITES, 1);
    io.forget_lost_writes();
    assert_eq!(kept.load(LOST_WRITES), 1);
}

/// A disk whose flushes and writes fail, since it is a pipe; without io_uring.
fn failing() -> (DiskIo, StateArea) {
    let (disk, _) = rustix::pipe::pipe().unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    let disk = Disk::of_pipe(disk.into(), 8);
    let io = DiskIo::new(disk, 1 << 16, kept.clone(), &RingStock::new(0)).unwrap();
    (io, kept)
}

/// The process may be killed in the transfer after it, and the kernel tells of a failure once.
#[test]
fn a_failed_flush_is_noted_before_anything_else_is_done() {
    let (mut io, kept) = failing();
    io.begin(transfer(1, Kind::Flush, 0, 0..0));
    io.begin(transfer(2, Kind::Write, 0, 0..512));
    io.submit();
    assert_eq!(kept.load(LOST_WRITES), 1);
    assert!(io.must_submit(), "the write comes after it");
    assert_eq!(results(&mut io), [(1, None), (2, None)]);
}

#[test]
fn a_failed_flush_is_noted_by_a_process_that_gives_up() {
    let (mut io, kept) = failing();
    io.begin(transfer(1, Kind::Flush, 0, 0..0));
    io.transfers.submit(io.disk.file().as_fd());
    drop(io);
    assert_eq!(kept.load(LOST_WRITES), 1);
}
