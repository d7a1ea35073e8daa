//! What a worker shares with a back-end is kept for the next service, and no longer.

use super::super::descriptor_store::{DescriptorStore, Keeper};
use super::*;
use rustix::fs::fstat;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use xen_virtio_backend::vhost_user::connection_name;

/// What is kept for the next service: names and duplicates.
#[derive(Clone, Default)]
struct Kept(Rc<RefCell<Vec<(String, OwnedFd)>>>);

impl Keeper for Kept {
    fn keep(&mut self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for descriptor in descriptors {
            let descriptor = descriptor.try_clone_to_owned()?;
            self.0.borrow_mut().push((name.to_owned(), descriptor));
        }
        Ok(())
    }

    fn forget(&mut self, name: &str) -> io::Result<()> {
        self.0.borrow_mut().retain(|(other, _)| other != name);
        Ok(())
    }
}

fn inodes(descriptors: &[OwnedFd]) -> Vec<u64> {
    let inode = |descriptor: &OwnedFd| fstat(descriptor).unwrap().st_ino;
    descriptors.iter().map(inode).collect()
}

#[test]
fn what_is_shared_is_kept_until_it_is_handed_on_or_its_guest_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("back-end");
    let _listener = UnixListener::bind(&path).unwrap();
    let lines = format!("[[device]]\ntype = \"rng\"\nsocket = {path:?}\n");
    let kept = Kept::default();
    let count = |kept: &Kept| kept.0.borrow().len();
    let mut dom0 = serving(&lines);
    dom0.supervisor.descriptors = DescriptorStore::new(Box::new(kept.clone()), Vec::new());
    // The next worker tells what it is handed.
    dom0.kill(0);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    let (attach, descriptors) = dom0.next_with_descriptors(1);
    assert!(matches!(attach, ToWorker::Attach(_)), "{attach:?}");
    assert!(matches!(dom0.next(1), ToWorker::Serve));
    let known = None;
    dom0.says(1, &FromWorker::Attached { key: FIRST, known });
    dom0.says(1, &FromWorker::Serving);
    assert_eq!(count(&kept), 0, "the back-end has not got the memory yet");
    let connection = connection_name(descriptors[0].as_fd()).unwrap();
    let shares = FromWorker::Shares {
        key: FIRST,
        connection,
    };
    dom0.says(1, &shares);
    dom0.until("it to be kept", |_| (count(&kept) == 2).then_some(()));
    let stored: Vec<_> = kept
        .0
        .borrow()
        .iter()
        .map(|(_, one)| one.try_clone().unwrap())
        .collect();
    assert_eq!(inodes(&stored), inodes(&descriptors));
    // Handed to the next worker, it is that one's to share.
    dom0.kill(1);
    dom0.begins(2, 3, &[(FIRST, true)]);
    assert_eq!(count(&kept), 0);
    dom0.says(2, &shares);
    dom0.until("it to be kept", |_| (count(&kept) == 2).then_some(()));
    dom0.store.release(3);
    dom0.until("it to be forgotten", |_| (count(&kept) == 0).then_some(()));
}
