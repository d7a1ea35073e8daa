//! Who looks on at a device's requests is told of them by its worker.

use super::*;
use crate::ctl::control;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

/// What comes of asking to be told by `pipe`.
fn trace(dom0: &mut Dom0, device: &'static str, pipe: OwnedFd) -> Result<String, String> {
    ask(dom0, move |path| {
        control::trace(path, "ivi", device, true, pipe.as_fd())
    })
}

#[test]
fn the_pipe_is_handed_to_the_devices_worker() {
    let mut dom0 = serving("[[device]]\ntype = \"rng\"\n");
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let kept = theirs.try_clone().unwrap();
    let traced = trace(&mut dom0, "virtio_file/0", theirs).unwrap();
    assert!(
        traced.starts_with("guest ivi (3), virtio_file/0"),
        "{traced}"
    );
    let (message, descriptors) = dom0.next_with_descriptors(0);
    assert!(
        matches!(
            message,
            ToWorker::Trace {
                key: FIRST,
                goes_on: true
            }
        ),
        "{message:?}"
    );
    let [pipe] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
    // Its worker does not wait for whoever reads, whatever a client does with its own end.
    fcntl_setfl(&kept, OFlags::empty()).unwrap();
    drop(kept);
    let mut pipe = File::from(pipe);
    let error = loop {
        if let Err(error) = pipe.write(&[b'x'; 4096]) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    drop(pipe);
    assert!(File::from(ours).read_to_end(&mut Vec::new()).unwrap() > 0);
}

/// Nobody answers for traces: a worker that does not read is not to be ended for their number.
#[test]
fn a_worker_that_does_not_listen_is_left_alone() {
    let mut dom0 = serving("[[device]]\ntype = \"rng\"\n");
    let refused = (0..2000).find_map(|_| {
        let (_ours, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        trace(&mut dom0, "virtio_file/0", theirs).err()
    });
    let error = refused.expect("a socket is full at some time");
    assert!(error.contains("too busy"), "{error}");
    // It is there still, and reads what it was sent.
    assert!(matches!(dom0.next(0), ToWorker::Trace { .. }));
    assert_eq!(dom0.workers.launched.borrow().len(), 1);
}

#[test]
fn what_cannot_be_traced_is_said() {
    let mut dom0 = serving("[[device]]\ntype = \"rng\"\n");
    let pipe = || pipe_with(PipeFlags::CLOEXEC).unwrap().1;
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    for (device, descriptor, expected) in [
        ("virtio/7", pipe(), "it has no device virtio/7"),
        ("virtio_file/0", file(), "is no pipe"),
    ] {
        let error = trace(&mut dom0, device, descriptor).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
