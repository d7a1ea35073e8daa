//! A keyboard of nobody's (`linux/uinput.h`), and what an input device tells (`linux/input.h`).

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

/// Bytes of `struct uinput_user_dev`: a name, `struct input_id`, the effects, four numbers for each of 64 axes.
const USER_DEV_BYTES: usize = 80 + 8 + 4 + 4 * 4 * 64;
/// Bytes of `struct input_event`: a time, which the kernel sets, a type, a code, a value.
const EVENT_BYTES: usize = 24;
const TYPE: usize = 16;

const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
const KEY_A: u16 = 30;
const REL_X: u16 = 0;

/// How long to wait for an event.
const LIMIT: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

nix::ioctl_none!(create, b'U', 1);
nix::ioctl_write_int!(set_event, b'U', 100);
nix::ioctl_write_int!(set_key, b'U', 101);
nix::ioctl_write_int!(set_relative, b'U', 102);

/// Makes a keyboard with a wheel, which goes when standard input ends. Each line of that has it press its key and turn its wheel;
/// `down` has it press its key, and `up` let go of it.
pub(crate) fn type_lines() -> Result<()> {
    let mut device = OpenOptions::new().write(true).open("/dev/uinput")?;
    let fd = device.as_raw_fd();
    // SAFETY: none of these calls takes a pointer.
    unsafe {
        set_event(fd, EV_KEY.into())?;
        set_event(fd, EV_REL.into())?;
        set_key(fd, KEY_A.into())?;
        set_relative(fd, REL_X.into())?;
    }
    let mut description = [0; USER_DEV_BYTES];
    description[..8].copy_from_slice(b"a wheel!");
    device.write_all(&description)?;
    // SAFETY: as above.
    unsafe { create(fd) }.context("making the device")?;
    println!("input: is there");
    for line in std::io::stdin().lock().lines() {
        let (down, up) = ((EV_KEY, KEY_A, 1), (EV_KEY, KEY_A, 0));
        let turn = (EV_REL, REL_X, -3);
        let end = (EV_SYN, 0, 0);
        let events: &[_] = match &line?[..] {
            "down" => &[down, end],
            "up" => &[up, end],
            _ => &[down, turn, end, up, end],
        };
        for (kind, code, value) in events.iter().copied() {
            let mut event = [0; EVENT_BYTES];
            event[TYPE..TYPE + 2].copy_from_slice(&u16::to_ne_bytes(kind));
            event[TYPE + 2..TYPE + 4].copy_from_slice(&u16::to_ne_bytes(code));
            event[TYPE + 4..].copy_from_slice(&i32::to_ne_bytes(value));
            device.write_all(&event)?;
        }
    }
    Ok(())
}

/// Waits for `count` events of the device, but for those that only end a group, and prints them.
pub(crate) fn wait_for(device: &Path, count: usize) -> Result<()> {
    let mut device = File::open(device)?;
    println!("input: waits");
    let mut seen = Vec::new();
    while seen.len() < count {
        let mut events = [PollFd::new(&device, PollFlags::IN)];
        if poll(&mut events, Some(&LIMIT))? == 0 {
            bail!(
                "{} of {count} events were seen: {}",
                seen.len(),
                seen.join(" ")
            );
        }
        let mut event = [0; EVENT_BYTES];
        device.read_exact(&mut event)?;
        let word = |place| u16::from_ne_bytes([event[place], event[place + 1]]);
        let value = event.last_chunk().expect("four bytes");
        if word(TYPE) != EV_SYN {
            let (kind, code) = (word(TYPE), word(TYPE + 2));
            seen.push(format!("{kind}:{code}:{}", i32::from_ne_bytes(*value)));
        }
    }
    println!("input: {count} seen: {}", seen.join(" "));
    Ok(())
}
