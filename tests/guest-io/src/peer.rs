//! The [peer] of a network device, on a tap that is in a bridge with the device's own.

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use xen_virtio_backend::tap::{Queues, attach};
use xen_virtio_guest_io::framing::peer::{self, Cable};

/// Bytes of the largest frame, with its header.
const LARGEST: usize = 1 << 17;

struct Tap(File);

impl Cable for Tap {
    fn receive(&mut self, wait: bool) -> io::Result<Option<Vec<u8>>> {
        let mut waits = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec::default();
        if poll(&mut waits, if wait { None } else { Some(&now) })? == 0 {
            return Ok(None);
        }
        let mut frame = vec![0; LARGEST];
        let len = self.0.read(&mut frame)?;
        frame.truncate(len);
        Ok(Some(frame))
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.write_all(frame)
    }
}

/// Does what frames ask for that come by the tap `name`, until one has it end.
pub(crate) fn serve(name: &str) -> Result<()> {
    let path = "/dev/net/tun";
    let file = OpenOptions::new().read(true).write(true).open(path);
    let tap = file.context(path)?;
    attach(tap.as_fd(), name, Queues::One).with_context(|| name.to_owned())?;
    peer::serve(&mut Tap(tap)).with_context(|| name.to_owned())
}
