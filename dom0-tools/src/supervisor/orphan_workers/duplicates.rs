//! What another process has open, found by its inode.
//!
//! The process may be any guest's, and a back-end may have sent it a file of a file system of its own (FUSE), which answers when it
//! likes. So no file is asked for anything, and of an epoll, which asks the files in it, no `fdinfo` is read: what `/proc` has of a
//! descriptor as a link comes from the kernel alone.

use crate::connections::close_later;
use crate::devices::Inherited;
use crate::supervisor::state_files::Shared;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// What the link of a descriptor of a memfd begins with; no epoll's does.
const MEMFD: &str = "/memfd:";

/// An open file, as `/proc` tells it from others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FileName {
    /// A socket, by its inode.
    Socket(u64),
    /// A memfd, by its mount, which is the kernel's own, and its inode.
    Memory { mount: u64, inode: u64 },
}

impl FileName {
    /// Of descriptor `fd` of the process whose folder is `process`. Linux tells of memfds' inodes from 5.14 on.
    fn of(process: &Path, fd: RawFd) -> Option<Self> {
        let fd = fd.to_string();
        let link = fs::read_link(process.join("fd").join(&fd)).ok()?;
        let link = link.to_str()?;
        if let Some(inode) = link.strip_prefix("socket:[") {
            return Some(Self::Socket(inode.strip_suffix(']')?.parse().ok()?));
        }
        if !link.starts_with(MEMFD) {
            return None;
        }
        let info = fs::read_to_string(process.join("fdinfo").join(fd)).ok()?;
        let number = |name: &str| {
            let mut lines = info.lines();
            let value = lines.find_map(|line| line.strip_prefix(name))?;
            value.trim().parse().ok()
        };
        Some(Self::Memory {
            mount: number("mnt_id:")?,
            inode: number("ino:")?,
        })
    }

    /// A memfd with this inode.
    fn memory(inode: u64) -> Option<Self> {
        let other = memfd_create("like", MemfdFlags::CLOEXEC).ok()?;
        match Self::of(&own(), other.as_raw_fd())? {
            Self::Memory { mount, .. } => Some(Self::Memory { mount, inode }),
            Self::Socket(_) => None,
        }
    }
}

fn own() -> PathBuf {
    PathBuf::from("/proc/self")
}

/// What process `pid`, known by `process`, shares with a back-end.
pub(super) fn of(process: &OwnedFd, pid: i32, shared: Shared) -> Option<Inherited> {
    let left = FileName::memory(shared.memory)?;
    let connection = FileName::Socket(shared.connection);
    Some(Inherited {
        left: duplicate(process, pid, left)?,
        socket: duplicate(process, pid, connection)?,
    })
}

/// The file `name` that the process has open.
fn duplicate(process: &OwnedFd, pid: i32, name: FileName) -> Option<OwnedFd> {
    let folder = Path::new("/proc").join(pid.to_string());
    let entries = fs::read_dir(folder.join("fd")).ok()?.flatten();
    let mut numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let number = numbers.find(|number| FileName::of(&folder, *number) == Some(name))?;
    let duplicate = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()?;
    // The process has gone on meanwhile, and may have another file there.
    if FileName::of(&own(), duplicate.as_raw_fd()) == Some(name) {
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
        // An epoll, whose `fdinfo` asks the files in it, is not looked into, whatever its number.
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        assert!(FileName::of(&own(), epoll.unwrap().as_raw_fd()).is_none());
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
