//! Waits until nobody else's transfers of a device are under way any more.
//!
//! A worker that is killed leaves transfers behind that the kernel still carries out. A write among them that
//! ended after the next worker's first would undo it. Each worker therefore holds a lock that belongs to its
//! open file, and so to whatever transfers of it are left.

use crate::libxl::EntryKey;
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
    // FNV-1a: the same in every version of this program.
    let text = format!("{vm}/{key}");
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What is done about earlier users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Earlier {
    Await,
    /// For a worker that has other devices to serve meanwhile.
    Refuse,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error(
        "somebody else has a lock on the disk: transfers of an earlier worker are under way, or another program \
         (`lslocks` says which) has locked it"
    )]
    Busy,
    #[error("the disk cannot be locked, which its file system must support")]
    Lock(#[from] Errno),
}

/// Takes lock `name` on `disk`, for as long as anybody uses this open file.
///
/// # Errors
///
/// [`LockError::Busy`] with [`Earlier::Refuse`] only.
pub(crate) fn take(disk: &OwnedFd, name: u64, earlier: Earlier) -> Result<(), LockError> {
    let byte = i64::try_from(name % BYTES).expect("below 2^61");
    let lock = libc::flock {
        l_type: libc::F_WRLCK.try_into().expect("a small constant"),
        l_whence: libc::SEEK_SET.try_into().expect("a small constant"),
        l_start: FIRST_BYTE + byte,
        l_len: 1,
        // Zero for a lock of the open file's.
        l_pid: 0,
    };
    let how = match earlier {
        Earlier::Await => FcntlArg::F_OFD_SETLKW(&lock),
        Earlier::Refuse => FcntlArg::F_OFD_SETLK(&lock),
    };
    match fcntl(disk, how) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(LockError::Busy),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libxl::Form;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn an_open_file_waits_for_another_of_the_same_device_only() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(path.reopen().unwrap());
        let lock = |vm, devid| {
            let form = Form::Disk;
            name(vm, EntryKey { form, devid })
        };
        let (first, second, other) = (open(), open(), open());
        take(&first, lock("/vm/a", 7), Earlier::Await).unwrap();
        for other_name in [lock("/vm/a", 8), lock("/vm/b", 7)] {
            take(&other, other_name, Earlier::Refuse).unwrap();
        }
        let refused = take(&second, lock("/vm/a", 7), Earlier::Refuse);
        assert!(matches!(refused, Err(LockError::Busy)), "{refused:?}");
        // As a transfer does that is under way.
        let in_use = first.try_clone().unwrap();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            take(&second, lock("/vm/a", 7), Earlier::Await).unwrap();
            sender.send(()).unwrap();
        });
        drop(first);
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(in_use);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
