//! What another process has open, found by its inode.
//!
//! The process may be any guest's, and a back-end may have sent it a file of a file system of its own (FUSE), which answers when it
//! likes. So no file is asked for anything until it is known to be one of the kernel's own.

use crate::connections::close_later;
use crate::devices::Inherited;
use crate::supervisor::state_files::Shared;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

/// What tells an open file from others: its inode, and the mount that this is of.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileName {
    mount: u64,
    inode: u64,
}

impl FileName {
    /// Of descriptor `fd` of process `process`; a number, or "self". Linux tells of inodes from 5.14 on.
    fn of(process: &str, fd: RawFd) -> Option<Self> {
        let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{fd}")).ok()?;
        let number = |name: &str| {
            let mut lines = info.lines();
            let value = lines.find_map(|line| line.strip_prefix(name))?;
            value.trim().parse().ok()
        };
        Some(Self {
            mount: number("mnt_id:")?,
            inode: number("ino:")?,
        })
    }

    /// A file with this inode, of the kind that `like` is one of.
    fn like(like: &OwnedFd, inode: u64) -> Option<Self> {
        let name = Self::of("self", like.as_raw_fd())?;
        Some(Self { inode, ..name })
    }
}

/// What process `pid`, known by `process`, shares with a back-end.
pub(super) fn of(process: &OwnedFd, pid: i32, shared: Shared) -> Option<Inherited> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let memory = memfd_create("like", MemfdFlags::CLOEXEC).ok()?;
    let connection = FileName::like(&socket.ok()?, shared.connection)?;
    let left = FileName::like(&memory, shared.memory)?;
    Some(Inherited {
        left: duplicate(process, pid, left)?,
        socket: duplicate(process, pid, connection)?,
    })
}

/// The file `name` that the process has open.
fn duplicate(process: &OwnedFd, pid: i32, name: FileName) -> Option<OwnedFd> {
    let pid = pid.to_string();
    let folder = Path::new("/proc").join(&pid);
    let entries = fs::read_dir(folder.join("fd")).ok()?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let number = numbers
        .into_iter()
        .find(|number| FileName::of(&pid, *number) == Some(name))?;
    let duplicate = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()?;
    // The process has gone on meanwhile, and may have another file there.
    if FileName::of("self", duplicate.as_raw_fd()) == Some(name) {
        return Some(duplicate);
    }
    close_later(&folder, vec![duplicate]);
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fstat;
    use rustix::process::{PidfdFlags, getpid, pidfd_open};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_a_process_shares_is_found_by_its_inodes() {
        let pid = getpid();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let pid = pid.as_raw_nonzero().get();
        let (socket, _other) = UnixStream::pair().unwrap();
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let inode = |file: &dyn AsFd| fstat(file.as_fd()).unwrap().st_ino;
        let shared = Shared {
            connection: inode(&socket),
            memory: inode(&memory),
        };
        let found = of(&process, pid, shared).unwrap();
        assert_eq!(
            (inode(&found.socket), inode(&found.left)),
            (shared.connection, shared.memory)
        );
        // Inodes of other kinds of files are none of these.
        for shared in [
            Shared {
                connection: shared.memory,
                ..shared
            },
            Shared {
                memory: shared.connection,
                ..shared
            },
            Shared {
                memory: u64::MAX,
                ..shared
            },
        ] {
            assert!(of(&process, pid, shared).is_none());
        }
    }
}
