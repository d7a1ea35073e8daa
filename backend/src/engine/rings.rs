//! The io_urings of a worker, made before its sandbox closes: they do the transfers of files, erase
//! parts of them, and nothing else.
//!
//! The kernel checks no entry of a ring against a system call filter. A ring of the stock refuses by itself
//! what is not listed here (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10), and that cannot be taken back.

use crate::tuning::MAX_REQUESTS;
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use std::cell::RefCell;
use std::io;
use std::rc::Rc;

/// `IORING_REGISTER_BUFFERS` and so on, of `linux/io_uring.h`.
const REGISTER_BUFFERS: u8 = 0;
const UNREGISTER_BUFFERS: u8 = 1;
const REGISTER_FILES: u8 = 2;
const UNREGISTER_FILES: u8 = 3;

/// Rings for devices that are attached later. A clone is the same stock.
#[derive(Clone)]
pub struct RingStock {
    rings: Rc<RefCell<Vec<IoUring>>>,
}

impl RingStock {
    /// What `io_uring_register` may be asked for on a ring of the stock.
    pub const REGISTER_OPS: [u8; 4] = [
        REGISTER_BUFFERS,
        UNREGISTER_BUFFERS,
        REGISTER_FILES,
        UNREGISTER_FILES,
    ];

    /// A stock of `count` rings, or of as many as the kernel gives. It makes no other ones later.
    pub fn new(count: usize) -> Self {
        let mut rings = Vec::with_capacity(count);
        while rings.len() < count {
            match restricted() {
                Ok(ring) => rings.push(ring),
                Err(error) => {
                    tracing::info!(
                        "the kernel gives {} of {count} io_urings with restrictions ({error}): a disk \
                         without one holds its guest up while it is slow",
                        rings.len()
                    );
                    break;
                }
            }
        }
        Self {
            rings: Rc::new(RefCell::new(rings)),
        }
    }

    /// A ring that knows no file and no buffer, if one is left.
    pub fn take(&self) -> Option<IoUring> {
        self.rings.borrow_mut().pop()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.rings.borrow().is_empty()
    }

    /// Takes back a ring on which nothing is in flight. The kernel lets go of its file and its buffer before
    /// this returns; of those of a ring that is dropped it does some time later.
    pub(crate) fn give_back(&self, mut ring: IoUring) {
        let unregistered = [
            ring.submitter().unregister_files(),
            ring.submitter().unregister_buffers(),
        ];
        let all_submitted = ring.submission().is_empty();
        let all_collected = ring.completion().is_empty();
        match unregistered.into_iter().find_map(failure) {
            None if all_submitted && all_collected => self.rings.borrow_mut().push(ring),
            None => tracing::warn!("an io_uring is given up: it has entries of its last file"),
            Some(error) => {
                tracing::warn!("an io_uring is given up: it keeps its last file ({error})");
            }
        }
    }
}

/// Why something is registered still.
fn failure(unregistered: io::Result<()>) -> Option<io::Error> {
    // ENXIO: nothing was registered.
    let nothing = |error: &io::Error| error.raw_os_error() == Some(libc::ENXIO);
    unregistered.err().filter(|error| !nothing(error))
}

/// Whether rings like those of workers can be made.
///
/// # Errors
///
/// The system's: it forbids them, or is older than Linux 5.10.
pub fn try_ring() -> io::Result<()> {
    restricted().map(drop)
}

/// A ring for a file's transfers.
fn restricted() -> io::Result<IoUring> {
    let ring: IoUring = IoUring::builder()
        .setup_r_disabled()
        .build(MAX_REQUESTS.into())?;
    let mut allowed = vec![
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::WriteFixed::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        // No descriptor is looked up, and no entry waits for another one.
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
    ];
    allowed.extend(RingStock::REGISTER_OPS.map(Restriction::register_op));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}
