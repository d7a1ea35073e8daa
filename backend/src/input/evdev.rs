//! An input device of dom0's: `/dev/input/event…`.

use super::description::Description;
use super::event::{Event, KEYS, kind};
use crate::ioctl;
use nix::sys::ioctl::ioctl_num_type;
use rustix::io::{Errno, read};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::syscalls;

/// Events that are read at once.
const AT_ONCE: usize = 64;

/// `ABS_MT_SLOT`: which finger the axes behind it are of.
const SLOT: u8 = 0x2f;
/// `ABS_MT_TRACKING_ID`: whether the finger is there.
const TRACKING: u16 = 0x39;
/// Fingers of a panel that are told apart.
const MAX_FINGERS: i32 = 64;

/// Switches that there can be, in whole bytes: `SW_CNT`.
const SWITCHES: usize = 0x18;

/// `EVIOCGKEY(KEYS / 8)`: which keys are pressed.
const KEYS_PRESSED: ioctl_num_type = nix::request_code_read!(b'E', 0x18, KEYS / 8);

/// `EVIOCGSW(SWITCHES / 8)`: which switches are on.
const SWITCHES_ON: ioctl_num_type = nix::request_code_read!(b'E', 0x1b, SWITCHES / 8);

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
    /// `fd` does not block.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The numbers of the calls that are made of it.
    pub fn calls() -> impl Iterator<Item = ioctl_num_type> {
        let axes = (0..=SLOT).map(axis_value);
        axes.chain([KEYS_PRESSED, SWITCHES_ON])
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

    /// The keys that are pressed now. Linux forgets what of keys was not read.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn pressed(&self) -> io::Result<BTreeSet<u16>> {
        let mut bits = [0u8; KEYS / 8];
        // SAFETY: the request has the bytes' length.
        unsafe { ioctl::with(self.fd(), KEYS_PRESSED, &mut bits) }?;
        Ok(set(&bits))
    }

    /// How what has a place of its own is now: switches, axes, and no finger on a panel, which Linux tells of once it moves.
    pub(super) fn places(&self, description: &Description) -> Vec<Event> {
        let mut places = Vec::new();
        let mut bits = [0u8; SWITCHES / 8];
        // SAFETY: the request has the bytes' length.
        if unsafe { ioctl::with(self.fd(), SWITCHES_ON, &mut bits) }.is_ok() {
            let on = set(&bits);
            places.extend(description.codes_of(kind::SWITCH).map(|code| Event {
                kind: kind::SWITCH,
                code,
                value: on.contains(&code).into(),
            }));
        }
        let fingers = description.axes.get(&SLOT.into());
        if let Some(slots) = fingers.filter(|_| description.axes.contains_key(&TRACKING)) {
            for slot in 0..=slots.maximum.min(MAX_FINGERS) {
                places.extend([absolute(SLOT.into(), slot), absolute(TRACKING, -1)]);
            }
        }
        // Of axes behind the slot, each finger has its own value.
        let axes = (0..=SLOT).filter(|axis| description.axes.contains_key(&u16::from(*axis)));
        places.extend(axes.filter_map(|axis| {
            let mut is = [0i32; size_of::<libc::input_absinfo>() / size_of::<i32>()];
            // SAFETY: these are as many numbers as `struct input_absinfo` has.
            unsafe { ioctl::with(self.fd(), axis_value(axis), &mut is) }.ok()?;
            Some(absolute(axis.into(), is[0]))
        }));
        places
    }
}

fn absolute(code: u16, value: i32) -> Event {
    Event {
        kind: kind::ABSOLUTE,
        code,
        value,
    }
}

/// The numbers of the bits that are set.
fn set(bits: &[u8]) -> BTreeSet<u16> {
    let bytes = (0u16..).zip(bits);
    let set = bytes.flat_map(|(place, byte)| {
        let set = (0..8).filter(move |bit| byte & 1 << bit != 0);
        set.map(move |bit| 8 * place + bit)
    });
    set.collect()
}
