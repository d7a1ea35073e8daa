//! The descriptors that systemd keeps for the next service (`FileDescriptorStoreMax=` in the unit, `sd_pid_notify_with_fds(3)`): what
//! workers share with back-ends. All of them are of the supervisor's making, and none came from a worker.
//!
//! Outside systemd nobody keeps any. The next service takes them from the workers themselves then ([`super::orphan_workers`]), for
//! which it needs `CAP_SYS_PTRACE`.

use super::state_files::Shared;
use crate::connections::close_later;
use crate::devices::Inherited;
use crate::systemd;
use crate::toolstack::libxl::EntryKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use sd_notify::NotifyState;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Who keeps descriptors.
pub(super) trait Keeper {
    /// Keeps these by `name`, beside what it has by that name already.
    fn keep(&mut self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Closes what it keeps by `name`.
    fn forget(&mut self, name: &str) -> io::Result<()>;
}

/// The service manager.
struct Systemd;

impl Keeper for Systemd {
    fn keep(&mut self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let told = [
            NotifyState::FdStore,
            NotifyState::FdName(name),
            // It would close a connection whose other end is closed, with all that was sent by it, and might be the last to do so.
            NotifyState::Custom("FDPOLL=0"),
        ];
        sd_notify::notify_with_fds(&told, descriptors)
    }

    fn forget(&mut self, name: &str) -> io::Result<()> {
        sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
    }
}

/// Outside systemd.
struct Nobody;

impl Keeper for Nobody {
    fn keep(&mut self, _name: &str, _descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self, _name: &str) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct DescriptorStore {
    keeper: Box<dyn Keeper>,
    /// What an earlier service has left.
    left: Vec<(String, OwnedFd)>,
    /// The names by which something is kept.
    kept: BTreeSet<String>,
}

impl Default for DescriptorStore {
    fn default() -> Self {
        Self::new(Box::new(Nobody), Vec::new())
    }
}

impl DescriptorStore {
    /// systemd's, with what it has kept for this service. Nobody's, if no service manager listens.
    ///
    /// # Errors
    ///
    /// If what it says of that makes no sense.
    pub(super) fn of_systemd() -> io::Result<Self> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(Self::default());
        }
        Ok(Self::new(Box::new(Systemd), systemd::given()?))
    }

    pub(super) fn new(keeper: Box<dyn Keeper>, left: Vec<(String, OwnedFd)>) -> Self {
        Self {
            keeper,
            kept: left.iter().map(|(name, _)| name.clone()).collect(),
            left,
        }
    }

    /// Of a guest's device, this is kept from now on, and nothing else; or nothing.
    ///
    /// # Errors
    ///
    /// What keeps the keeper from being told.
    pub(super) fn keep(
        &mut self,
        device: (u16, EntryKey),
        shared: Option<&Inherited>,
    ) -> io::Result<()> {
        let name = name(device);
        self.forget(&name)?;
        let Some(Inherited { socket, left }) = shared else {
            return Ok(());
        };
        self.keeper.keep(&name, &[socket.as_fd(), left.as_fd()])?;
        self.kept.insert(name);
        Ok(())
    }

    /// What an earlier service has left of a guest's device that is `shared`.
    pub(super) fn left(&self, device: (u16, EntryKey), shared: Shared) -> Option<Inherited> {
        let name = name(device);
        let find = |wanted| {
            let mut left = self.left.iter();
            let (_, descriptor) =
                left.find(|(other, left)| *other == name && Kind::of(left) == Some(wanted))?;
            descriptor.try_clone().ok()
        };
        let socket = find(Kind::Connection(shared.connection))?;
        // A worker has gone on from what that memory says, if there was one, when it or the back-end has ended the connection.
        (!has_ended(&socket)).then_some(Inherited {
            socket,
            left: find(Kind::Memory(shared.memory))?,
        })
    }

    /// Forgets what an earlier service has left but of these devices, of which the others are gone.
    ///
    /// # Errors
    ///
    /// What keeps the keeper from being told.
    pub(super) fn sweep(&mut self, devices: &[(u16, EntryKey)]) -> io::Result<()> {
        let known: BTreeSet<_> = devices.iter().map(|device| name(*device)).collect();
        let over: Vec<_> = self.kept.difference(&known).cloned().collect();
        over.iter().try_for_each(|name| self.forget(name))
    }

    /// The guest is gone.
    ///
    /// # Errors
    ///
    /// What keeps the keeper from being told.
    pub(super) fn end_guest(&mut self, domid: u16) -> io::Result<()> {
        self.end_others(domid, std::iter::empty())
    }

    /// Of the guest's devices, only these are there.
    ///
    /// # Errors
    ///
    /// What keeps the keeper from being told.
    pub(super) fn end_others(
        &mut self,
        domid: u16,
        there: impl Iterator<Item = EntryKey>,
    ) -> io::Result<()> {
        let prefix = prefix(domid);
        let there: BTreeSet<_> = there.map(|key| name((domid, key))).collect();
        let its = self.kept.difference(&there);
        let its = its.filter(|name| name.starts_with(&prefix));
        let its: Vec<_> = its.cloned().collect();
        its.iter().try_for_each(|name| self.forget(name))
    }

    fn forget(&mut self, name: &str) -> io::Result<()> {
        if !self.kept.contains(name) {
            return Ok(());
        }
        self.keeper.forget(name)?;
        self.kept.remove(name);
        let of_name = |left: &mut (String, OwnedFd)| left.0 == name;
        let closed = self.left.extract_if(.., of_name).map(|(_, left)| left);
        // After the keeper, who is not to wait for what a back-end may have sent.
        close_later(Path::new(name), closed.collect());
        Ok(())
    }
}

/// What systemd knows a device's by. All names of its together have room in one variable of the environment: 128 KiB.
fn name((domid, key): (u16, EntryKey)) -> String {
    format!("{}{key}", prefix(domid))
}

fn prefix(domid: u16) -> String {
    format!("{domid}/")
}

/// A descriptor, as the records of what is shared tell it from others: sockets and memory have numbers of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connection(u64),
    Memory(u64),
}

impl Kind {
    fn of(descriptor: &OwnedFd) -> Option<Self> {
        let status = fstat(descriptor).ok()?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Socket => Some(Self::Connection(status.st_ino)),
            FileType::RegularFile => Some(Self::Memory(status.st_ino)),
            _ => None,
        }
    }
}

/// Whether one end of a connection has ended it.
fn has_ended(connection: &OwnedFd) -> bool {
    let mut connection = [PollFd::new(connection, PollFlags::RDHUP)];
    let polled = poll(&mut connection, Some(&Timespec::default()));
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    polled.is_err() || connection[0].revents().intersects(ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::cell::{Cell, RefCell};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    /// What a keeper has: the descriptors' names and inodes.
    #[derive(Clone, Default)]
    struct Kept(Rc<RefCell<Vec<(String, u64)>>>);

    /// A keeper that is told nothing for now.
    #[derive(Clone, Default)]
    struct Deaf {
        kept: Kept,
        is_deaf: Rc<Cell<bool>>,
    }

    impl Keeper for Deaf {
        fn keep(&mut self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
            self.kept.keep(name, descriptors)
        }

        fn forget(&mut self, name: &str) -> io::Result<()> {
            match self.is_deaf.get() {
                true => Err(io::ErrorKind::WouldBlock.into()),
                false => self.kept.forget(name),
            }
        }
    }

    #[test]
    fn what_could_not_be_forgotten_is_forgotten_the_next_time() {
        let keeper = Deaf::default();
        let mut store = DescriptorStore::new(Box::new(keeper.clone()), Vec::new());
        let (shared, ..) = pair();
        store.keep(device(3, 0), Some(&shared)).unwrap();
        keeper.is_deaf.set(true);
        assert!(store.end_guest(3).is_err());
        keeper.is_deaf.set(false);
        store.end_guest(3).unwrap();
        assert!(keeper.kept.inodes(device(3, 0)).is_empty());
    }

    impl Keeper for Kept {
        fn keep(&mut self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
            for descriptor in descriptors {
                let inode = fstat(descriptor)?.st_ino;
                self.0.borrow_mut().push((name.to_owned(), inode));
            }
            Ok(())
        }

        fn forget(&mut self, name: &str) -> io::Result<()> {
            self.0.borrow_mut().retain(|(other, _)| other != name);
            Ok(())
        }
    }

    fn inode_of(descriptor: &OwnedFd) -> u64 {
        fstat(descriptor).unwrap().st_ino
    }

    /// What is shared, and the back-end's end of it.
    fn pair() -> (Inherited, Shared, UnixStream) {
        let (socket, other) = UnixStream::pair().unwrap();
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let pair = Inherited {
            socket: socket.into(),
            left: memory,
        };
        let shared = Shared {
            connection: inode_of(&pair.socket),
            memory: inode_of(&pair.left),
        };
        (pair, shared, other)
    }

    const fn device(domid: u16, devid: u32) -> (u16, EntryKey) {
        let form = EntryForm::File;
        (domid, EntryKey { form, devid })
    }

    impl Kept {
        fn inodes(&self, device: (u16, EntryKey)) -> Vec<u64> {
            let kept = self.0.borrow();
            let of_name = kept.iter().filter(|(other, _)| *other == name(device));
            of_name.map(|(_, inode)| *inode).collect()
        }
    }

    #[test]
    fn a_device_has_what_it_shares_now_and_nothing_from_before() {
        let kept = Kept::default();
        let mut store = DescriptorStore::new(Box::new(kept.clone()), Vec::new());
        let [(first, ..), (second, shared, _), (other, ..)] = [pair(), pair(), pair()];
        store.keep(device(3, 0), Some(&first)).unwrap();
        store.keep(device(3, 1), Some(&other)).unwrap();
        store.keep(device(3, 0), Some(&second)).unwrap();
        let inodes = [shared.connection, shared.memory];
        assert_eq!(kept.inodes(device(3, 0)), inodes);
        assert!(
            !name(device(3, 0)).contains(':'),
            "systemd parts names by colons"
        );
        store.keep(device(3, 0), None).unwrap();
        store.keep(device(3, 0), None).unwrap();
        assert!(kept.inodes(device(3, 0)).is_empty());
        assert_eq!(kept.inodes(device(3, 1)).len(), 2);
        // Another guest's are not the guest's.
        store.keep(device(30, 0), Some(&first)).unwrap();
        store.keep(device(3, 0), Some(&second)).unwrap();
        let there = [device(3, 1).1].into_iter();
        store.end_others(3, there).unwrap();
        assert!(kept.inodes(device(3, 0)).is_empty());
        assert_eq!(kept.inodes(device(3, 1)).len(), 2);
        store.end_guest(3).unwrap();
        assert!(kept.inodes(device(3, 1)).is_empty());
        assert_eq!(kept.inodes(device(30, 0)).len(), 2);
    }

    /// A store that has left what three devices share, and who has kept it.
    fn left(devices: [((u16, EntryKey), Inherited); 3]) -> (DescriptorStore, Kept) {
        let kept = Kept::default();
        let mut left = Vec::new();
        for (
            device,
            Inherited {
                socket,
                left: memory,
            },
        ) in devices
        {
            for descriptor in [socket, memory] {
                let inode = inode_of(&descriptor);
                kept.0.borrow_mut().push((name(device), inode));
                left.push((name(device), descriptor));
            }
        }
        (DescriptorStore::new(Box::new(kept.clone()), left), kept)
    }

    #[test]
    fn what_was_left_is_found_by_its_device_and_what_is_known_of_it() {
        let [(first, known, back_end), (gone, unknown, _back_end)] = [pair(), pair()];
        let (other, others, mut third) = pair();
        let devices = [
            (device(3, 0), first),
            (device(4, 0), gone),
            (device(4, 1), other),
        ];
        let (mut store, kept) = left(devices);
        assert!(store.left(device(4, 0), unknown).is_some());
        store.sweep(&[device(3, 0), device(4, 1)]).unwrap();
        assert!(store.left(device(4, 0), unknown).is_none());
        assert!(kept.inodes(device(4, 0)).is_empty());
        let inherited = store.left(device(3, 0), known).unwrap();
        assert_eq!(inode_of(&inherited.socket), known.connection);
        assert_eq!(inode_of(&inherited.left), known.memory);
        // Numbers of others, and of the other kind.
        for wrong in [
            others,
            Shared { memory: 0, ..known },
            Shared {
                connection: known.memory,
                memory: known.connection,
            },
        ] {
            assert!(store.left(device(3, 0), wrong).is_none());
        }
        assert!(store.left(device(4, 1), known).is_none());
        drop(back_end);
        assert!(store.left(device(3, 0), known).is_none(), "nobody is there");
        // A guest that is gone before its device was handed on leaves no connection, a little later.
        store.end_guest(4).unwrap();
        let read = third.read(&mut [0]);
        assert_eq!(read.unwrap(), 0);
    }
}
