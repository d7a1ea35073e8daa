//! Waits until nobody else's transfers of a device are under way any more, and tells other programs that an image is in
//! use.
//!
//! A worker that is killed leaves transfers behind that the kernel still carries out. A write among them that
//! ended after the next worker's first would undo it. Each worker therefore holds a lock that belongs to its
//! open file, and so to whatever transfers of it are left, and begins nothing before it has that.

use crate::text::stable_hash;
use crate::toolstack::libxl::EntryKey;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::OwnedFd;

/// Bytes that are locked, one a device, so that devices which share a disk do not wait for each other: far
/// behind the end of any disk.
const FIRST_BYTE: i64 = 1 << 62;
const BYTES: u64 = 1 << 61;

/// The name of the lock of device `key` of the guest that xenstore has at `vm`: the same after a reboot,
/// which gives the guest another domid.
pub(crate) fn name(vm: &str, key: EntryKey) -> u64 {
    stable_hash(&format!("{vm}/{key}"))
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error(
        "somebody else has a lock on the disk: transfers of an earlier worker are under way, or another program \
         (`lslocks` says which) has locked it"
    )]
    Busy,
    #[error(
        "another program uses the image, by QEMU's locks (`lslocks` says which): end that, or say that it is shared \
         ([[disk]] shared = true)"
    )]
    Image,
    #[error("the disk cannot be locked, which its file system must support")]
    Lock(#[from] Errno),
}

impl LockError {
    /// Whether it may go away by itself.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Busy | Self::Image)
    }
}

/// Takes lock `name` on `disk`, for as long as anybody uses this open file.
///
/// # Errors
///
/// [`LockError::Busy`] while somebody else has it.
pub(crate) fn take(disk: &OwnedFd, name: u64) -> Result<(), LockError> {
    let lock = lock(libc::F_WRLCK, byte_of(name));
    match fcntl(disk, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(LockError::Busy),
        Err(errno) => Err(errno.into()),
    }
}

/// The locks of all files (proc_locks(5)).
const LOCKS: &str = "/proc/locks";

/// The locks of all files, as they are at a moment.
pub(crate) struct Locks(Option<String>);

impl Locks {
    pub(crate) fn read() -> Self {
        let read = std::fs::read_to_string(LOCKS);
        Self(
            read.inspect_err(|error| {
                tracing::error!(
                    "{LOCKS} cannot be read, and a disk that nobody has any more waits for that: {error}"
                );
            })
            .ok(),
        )
    }

    /// Whether somebody has lock `name`, of the file or device node `inode` if that is given: a worker, or what one that
    /// was killed has left under way. The disk is not asked, which may hang.
    pub(crate) fn have(&self, name: u64, inode: Option<u64>) -> bool {
        self.0
            .as_deref()
            .is_none_or(|locks| lists(locks, name, inode))
    }
}

/// Whether `locks` has the one that is named `name`, and not only somebody who waits for it.
fn lists(locks: &str, name: u64, inode: Option<u64>) -> bool {
    let byte = byte_of(name).to_string();
    locks.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().skip(1).collect();
        // The device's number is not compared: some file systems have another one here than stat tells.
        let is_of = |file: &str| inode.is_none_or(|inode| file.ends_with(&format!(":{inode}")));
        matches!(fields[..], ["OFDLCK", _, "WRITE", _, file, start, _] if start == byte && is_of(file))
    })
}

fn byte_of(name: u64) -> i64 {
    FIRST_BYTE + i64::try_from(name % BYTES).expect("below 2^61")
}

/// A lock of the open file's on one byte.
fn lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind.try_into().expect("a small constant"),
        l_whence: libc::SEEK_SET.try_into().expect("a small constant"),
        l_start: byte,
        l_len: 1,
        // Zero for a lock of the open file's.
        l_pid: 0,
    }
}

/// What QEMU and its tools lock bytes of an image for (`docs/system/images.rst`, "Disk image file locking"): one byte
/// each for what is done to it, and one each for what nobody else may do.
const QEMU_DOES: i64 = 100;
const QEMU_FORBIDS: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Tells QEMU and its tools that the image is in use, for as long as this open file is: nobody else may write it.
///
/// # Errors
///
/// [`LockError::Image`] if they use it in a way that does not go with that.
pub(crate) fn take_image(image: &OwnedFd, writes: bool) -> Result<(), LockError> {
    let does: &[i64] = if writes {
        &[CONSISTENT_READ, WRITE]
    } else {
        &[CONSISTENT_READ]
    };
    let forbids = [WRITE, RESIZE];
    let taken = does
        .iter()
        .map(|what| QEMU_DOES + what)
        .chain(forbids.map(|what| QEMU_FORBIDS + what));
    for byte in taken.clone() {
        match fcntl(image, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(LockError::Image),
            Err(errno) => return Err(errno.into()),
        }
    }
    let opposed = does
        .iter()
        .map(|what| QEMU_FORBIDS + what)
        .chain(forbids.map(|what| QEMU_DOES + what));
    for byte in opposed {
        let mut found = lock(libc::F_WRLCK, byte);
        fcntl(image, FcntlArg::F_OFD_GETLK(&mut found))?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            for byte in taken {
                fcntl(image, FcntlArg::F_OFD_SETLK(&lock(libc::F_UNLCK, byte)))?;
            }
            return Err(LockError::Image);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;
    use std::time::{Duration, Instant};

    /// Programs that other tests start have our files open for a moment, until they are executed.
    pub(crate) fn until_free(mut is_free: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !is_free() {
            assert!(Instant::now() < end, "somebody has the lock");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_open_file_excludes_others_of_the_same_device_only() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(path.reopen().unwrap());
        let lock = |vm, devid| {
            let form = EntryForm::Disk;
            name(vm, EntryKey { form, devid })
        };
        let (first, second, other) = (open(), open(), open());
        take(&first, lock("/vm/a", 7)).unwrap();
        for other_name in [lock("/vm/a", 8), lock("/vm/b", 7)] {
            take(&other, other_name).unwrap();
        }
        let held = |devid| Locks::read().have(lock("/vm/a", devid), None);
        assert_eq!([7, 9].map(held), [true, false]);
        // As a transfer does that is under way.
        let in_use = first.try_clone().unwrap();
        drop(first);
        let refused = take(&second, lock("/vm/a", 7));
        assert!(matches!(refused, Err(LockError::Busy)), "{refused:?}");
        drop(in_use);
        until_free(|| take(&second, lock("/vm/a", 7)).is_ok());
    }

    /// As Linux writes them (`fs/locks.c`, `lock_get_status`).
    #[test]
    fn a_lock_is_found_among_others_by_its_byte() {
        let locks = "1: OFDLCK ADVISORY  WRITE -1 fd:00:17 4611686018427387907 4611686018427387907\n\
                     1: -> OFDLCK ADVISORY  WRITE -1 fd:00:17 4611686018427387907 4611686018427387907\n\
                     2: POSIX  ADVISORY  WRITE 612 00:19:847 4611686018427387908 4611686018427387908\n\
                     3: OFDLCK ADVISORY  READ  -1 fd:00:17 4611686018427387909 4611686018427387909\n\
                     4: -> OFDLCK ADVISORY  WRITE -1 fd:00:17 4611686018427387910 4611686018427387910\n";
        let held = |name| lists(locks, name, None);
        assert_eq!([3, 4, 5, 6].map(held), [true, false, false, false]);
        let held_of = |inode| lists(locks, 3, Some(inode));
        assert_eq!([17, 7, 18].map(held_of), [true, false, false]);
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(path.reopen().unwrap());
        let busy =
            |image: &OwnedFd, writes| matches!(take_image(image, writes), Err(LockError::Image));
        let (first, second) = (open(), open());
        take_image(&first, false).unwrap();
        take_image(&second, false).unwrap();
        let writer = open();
        assert!(busy(&writer, true));
        drop(first);
        assert!(busy(&writer, true));
        drop(second);
        until_free(|| take_image(&writer, true).is_ok());
        for writes in [true, false] {
            assert!(busy(&open(), writes));
        }
    }

    /// QEMU's own tool is refused, and refuses us.
    #[test]
    fn qemu_img_understands() {
        use std::process::Command;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let mut write = Command::new("qemu-io");
        write
            .args(["-f", "raw", "-c", "write 0 512"])
            .arg(image.path());
        let Ok(free) = write.output() else {
            eprintln!("qemu-io is not here: QEMU's view of our locks is not tested");
            return;
        };
        assert!(free.status.success(), "{free:?}");
        let ours = OwnedFd::from(image.reopen().unwrap());
        take_image(&ours, true).unwrap();
        let refused = write.output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains("lock"),
            "{refused:?}"
        );
    }
}
