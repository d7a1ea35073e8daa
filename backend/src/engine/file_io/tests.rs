//! What a ring does and refuses, and who has it.

use super::*;
use io_uring::squeue;
use std::fs::File;
use std::os::fd::AsFd;
use vm_memory::Bytes;

fn file_of(bytes: &[u8], rings: &RingStock) -> (File, FileIo) {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    let io = FileIo::new(file.as_fd(), 1 << 16, rings).unwrap();
    (file, io)
}

fn has_ring(io: &FileIo) -> bool {
    matches!(io.engine, Engine::Uring { .. })
}

/// Whether this machine's kernel gives rings. A test that wants one says if it does not.
fn kernel_gives_rings() -> bool {
    let given = RingStock::new(1).take().is_some();
    if !given {
        eprintln!(
            "this kernel gives no io_uring with restrictions: only the other engine is tested"
        );
    }
    given
}

fn read(io: &mut FileIo, file: &File) -> io::Result<usize> {
    io.begin(Transfer {
        id: 0,
        kind: Kind::Read,
        offset: 0,
        place: 0..512,
    });
    loop {
        io.submit(file.as_fd());
        if let Some((0, result)) = io.next_ended() {
            return result;
        }
    }
}

/// What the kernel says of `entry`.
fn result(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
    // SAFETY: the entries of the tests use no memory but a path, which is a constant.
    unsafe { ring.submission().push(entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

#[test]
fn a_ring_does_nothing_but_a_disks_transfers() {
    if !kernel_gives_rings() {
        assert!(!has_ring(&file_of(&[0; 4096], &RingStock::new(1)).1));
        return;
    }
    let mut ring = RingStock::new(1).take().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let fd = file.as_file().as_raw_fd();
    ring.submitter().register_files(&[fd]).unwrap();
    assert_eq!(result(&mut ring, &opcode::Fsync::new(FILE).build()), 0);
    let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0);
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr());
    let fixed = squeue::Flags::FIXED_FILE;
    for (what, entry) in [
        ("a socket", socket.build().flags(fixed)),
        ("a path", open.build().flags(fixed)),
        ("nothing", opcode::Nop::new().build().flags(fixed)),
        ("a descriptor", opcode::Fsync::new(types::Fd(fd)).build()),
        (
            "a link",
            opcode::Fsync::new(FILE)
                .build()
                .flags(squeue::Flags::IO_LINK),
        ),
    ] {
        assert_eq!(result(&mut ring, &entry), -libc::EACCES, "{what}");
    }
    let refused = ring.submitter().register_eventfd(fd).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    let again = ring.submitter().register_restrictions(&mut []).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(libc::EACCES));
}

#[test]
fn a_ring_goes_from_one_file_to_the_next() {
    let given = kernel_gives_rings();
    let rings = RingStock::new(1);
    for round in 1..4 {
        let (file, mut io) = file_of(&[round; 4096], &rings);
        assert_eq!(has_ring(&io), given);
        // While it is taken, another file goes without.
        assert!(!has_ring(&file_of(&[0; 4096], &rings).1));
        assert_eq!(read(&mut io, &file).unwrap(), 512);
        let mut bytes = [0; 512];
        io.memory().read_slice(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [round; 512]);
    }
}

#[test]
fn a_ring_with_entries_of_its_last_file_is_given_up() {
    let rings = RingStock::new(1);
    let Some(mut ring) = rings.take() else {
        assert!(!kernel_gives_rings());
        return;
    };
    // SAFETY: the kernel never sees the entry.
    unsafe { ring.submission().push(&opcode::Fsync::new(FILE).build()) }.unwrap();
    rings.give_back(ring);
    assert!(rings.take().is_none());
}

#[test]
fn a_file_that_goes_waits_for_no_transfer() {
    if !kernel_gives_rings() {
        return;
    }
    let (file, _other_end) = rustix::pipe::pipe().unwrap();
    let rings = RingStock::new(1);
    let mut io = FileIo::new(file.as_fd(), 1 << 16, &rings).unwrap();
    io.begin(Transfer {
        id: 0,
        kind: Kind::Read,
        offset: 0,
        place: 0..512,
    });
    io.submit(file.as_fd());
    drop(io);
    // The ring may tell of the transfer some time: nobody else has it.
    assert!(rings.take().is_none());
}
