//! Where frames come from and go to.

use crate::engine::volatile_io;
use crate::tap::{self, Queues};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_memory::VolatileSlice;

/// One queue of an interface: frames, each with a header before it (virtio 1.3, 5.1.6). No call waits.
pub trait Interface {
    /// Reads a frame into `to`, of which what has no room is lost. How many bytes it has.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is none; another one if there will be none any more.
    fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<usize>;

    /// # Errors
    ///
    /// If the frame is lost.
    fn write(&mut self, frame: &VolatileSlice<'_>) -> io::Result<()>;

    /// Tells of every frame that can be read.
    fn readable(&self) -> BorrowedFd<'_>;

    /// What it may hand over to a driver that has accepted the features `accepted`, `VIRTIO_NET_F_GUEST_…`.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_offloads(&mut self, accepted: u64) -> io::Result<()>;

    /// Whether frames may come by this queue.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_used(&mut self, is_used: bool) -> io::Result<()>;
}

/// A queue of a tap, or of a macvtap.
#[derive(Debug)]
pub struct Tap {
    /// Without blocking.
    queue: OwnedFd,
    queues: Queues,
}

impl Tap {
    /// `queue` was [attached](tap::attach), and does not block.
    pub fn new(queue: OwnedFd, queues: Queues) -> Self {
        Self { queue, queues }
    }
}

impl Interface for Tap {
    fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<usize> {
        volatile_io::read(&mut self.queue, to)
    }

    fn write(&mut self, frame: &VolatileSlice<'_>) -> io::Result<()> {
        // A frame goes whole or not at all.
        volatile_io::write(&mut self.queue, frame).map(drop)
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn set_offloads(&mut self, accepted: u64) -> io::Result<()> {
        tap::set_offloads(self.queue.as_fd(), tap::offloads(accepted))
    }

    fn set_used(&mut self, is_used: bool) -> io::Result<()> {
        match self.queues {
            Queues::One => Ok(()),
            Queues::Several => match tap::use_queue(self.queue.as_fd(), is_used) {
                // An earlier process has said so.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
                result => result,
            },
        }
    }
}
