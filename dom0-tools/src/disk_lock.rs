//! Waits until nobody else's transfers of a device are under way any more.
//!
//! A worker that is killed leaves transfers behind that the kernel still carries out. A write among them that
//! ended after the next worker's first would undo it. Each worker therefore holds a lock that belongs to its
//! open file, and so to whatever transfers of it are left.

use crate::libxl::EntryKey;
use anyhow::{Context, Result};
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

/// Takes lock `name` on `disk`, for as long as anybody uses this open file.
///
/// # Errors
///
/// If the disk's file system has no locks.
pub(crate) fn wait_for_earlier_users(disk: &OwnedFd, name: u64) -> Result<()> {
    let byte = i64::try_from(name % BYTES).expect("below 2^61");
    let lock = libc::flock {
        l_type: libc::F_WRLCK.try_into().expect("a small constant"),
        l_whence: libc::SEEK_SET.try_into().expect("a small constant"),
        l_start: FIRST_BYTE + byte,
        l_len: 1,
        // Zero for a lock of the open file's.
        l_pid: 0,
    };
    fcntl(disk, FcntlArg::F_OFD_SETLKW(&lock))
        .context("locking the disk, which its file system must support")?;
    Ok(())
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
        wait_for_earlier_users(&first, lock("/vm/a", 7)).unwrap();
        wait_for_earlier_users(&other, lock("/vm/a", 8)).unwrap();
        wait_for_earlier_users(&other, lock("/vm/b", 7)).unwrap();
        // As a transfer does that is under way.
        let in_use = first.try_clone().unwrap();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            wait_for_earlier_users(&second, lock("/vm/a", 7)).unwrap();
            sender.send(()).unwrap();
        });
        drop(first);
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(in_use);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
