//! An input device of dom0's: `/dev/input/event…`.

use super::description::Description;
use super::event::{Event, KEYS, kind};
use crate::ioctl;
use nix::sys::ioctl::ioctl_num_type;
use rustix::io::{Errno, read, write};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::syscalls;

/// Events that are read at once.
const AT_ONCE: usize = 64;

/// Axes that there can be: `ABS_CNT`.
const AXES: u8 = 0x40;
/// `ABS_MT_SLOT`: from here on, axes have a value for each finger.
const FINGERS: u8 = 0x2f;

/// `EVIOCGKEY(KEYS / 8)`: which keys are pressed.
const KEYS_PRESSED: ioctl_num_type = nix::request_code_read!(b'E', 0x18, KEYS / 8);

/// `EVIOCGABS(axis)`: an axis's value, and how it is.
const fn axis_value(axis: u8) -> ioctl_num_type {
    nix::request_code_read!(b'E', 0x40 + axis, size_of::<libc::input_absinfo>())
}

/// A device of dom0's, which this service has for itself.
#[derive(Debug)]
pub struct Evdev(OwnedFd);

/// What a look at a device came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Looked {
    /// These, and there may be more.
    Events(Vec<Event>),
    Nothing,
    /// It was taken away.
    Gone,
}

impl Evdev {
    /// `fd` does not block, and is to be written too.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The numbers of the calls that are made of it.
    pub fn calls() -> impl Iterator<Item = ioctl_num_type> {
        (0..AXES).map(axis_value).chain([KEYS_PRESSED])
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(super) fn read(&self) -> Looked {
        let mut bytes = [0; AT_ONCE * Event::OF_LINUX];
        syscalls::count();
        match read(&self.0, &mut bytes) {
            Ok(len) if len >= Event::OF_LINUX => {
                let (events, _) = bytes[..len].as_chunks();
                Looked::Events(events.iter().map(Event::of_linux).collect())
            }
            Err(Errno::AGAIN | Errno::INTR) => Looked::Nothing,
            Ok(_) | Err(_) => Looked::Gone,
        }
    }

    /// Has the device do what the guest says. What it does not take is lost, as if it had not that light.
    pub(super) fn write(&self, event: Event) {
        for event in [event, Event::REPORT] {
            syscalls::count();
            let _ = write(&self.0, &event.to_linux());
        }
    }

    /// The keys that are pressed now.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn pressed(&self) -> io::Result<BTreeSet<u16>> {
        let mut bits = [0u8; KEYS / 8];
        // SAFETY: the request has the bytes' length.
        unsafe { ioctl::with(self.fd(), KEYS_PRESSED, &mut bits) }?;
        let is_set = |key: &u16| bits[usize::from(key / 8)] & 1 << (key % 8) != 0;
        let keys = 0..u16::try_from(KEYS).expect("few keys");
        Ok(keys.filter(is_set).collect())
    }

    /// Where the axes of `description` are now, but for those that have a value for each finger.
    pub(super) fn axes(&self, description: &Description) -> Vec<Event> {
        let axes = (0..FINGERS).filter(|axis| description.axes.contains_key(&u16::from(*axis)));
        axes.filter_map(|of| {
            let mut axis = [0i32; size_of::<libc::input_absinfo>() / size_of::<i32>()];
            // SAFETY: these are as many numbers as `struct input_absinfo` has.
            unsafe { ioctl::with(self.fd(), axis_value(of), &mut axis) }.ok()?;
            Some(Event {
                kind: kind::ABSOLUTE,
                code: of.into(),
                value: axis[0],
            })
        })
        .collect()
    }
}
