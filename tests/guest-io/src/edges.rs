//! Interrupts of a line of general purpose, by its chip's device (`linux/gpio.h`).

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// `struct gpio_v2_line_request`, of which a few fields are used, by their places.
const REQUEST_BYTES: usize = 592;
const OFFSETS: usize = 0;
const FLAGS: usize = 288;
const LINES: usize = 560;
const DESCRIPTOR: usize = 588;
/// `GPIO_V2_LINE_FLAG_INPUT` and `GPIO_V2_LINE_FLAG_EDGE_RISING`.
const RISING_INPUT: u64 = 1 << 2 | 1 << 4;
/// Bytes of `struct gpio_v2_line_event`.
const EVENT_BYTES: usize = 48;

/// How long to wait for an edge.
const LIMIT: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

nix::ioctl_readwrite!(get_line, 0xb4, 0x07, [u8; REQUEST_BYTES]);

/// Waits for `count` rising edges of line `line` of the chip at `chip`.
pub(crate) fn wait_for(chip: &Path, line: u32, count: usize) -> Result<()> {
    let chip = File::open(chip).context("opening the chip")?;
    let mut request = [0; REQUEST_BYTES];
    request[OFFSETS..OFFSETS + 4].copy_from_slice(&line.to_ne_bytes());
    request[FLAGS..FLAGS + 8].copy_from_slice(&RISING_INPUT.to_ne_bytes());
    request[LINES..LINES + 4].copy_from_slice(&1u32.to_ne_bytes());
    // SAFETY: the kernel writes no more than the structure, which is all of the array.
    unsafe { get_line(chip.as_raw_fd(), &raw mut request) }.context("asking for the line")?;
    let descriptor = request[DESCRIPTOR..].first_chunk().expect("four bytes");
    // SAFETY: the call has made it, and nobody else knows of it.
    let line = unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(*descriptor)) };
    let mut line = File::from(line);
    println!("edges: waits");
    for seen in 0..count {
        let mut events = [PollFd::new(&line, PollFlags::IN)];
        if poll(&mut events, Some(&LIMIT))? == 0 {
            bail!("{seen} of {count} edges were seen");
        }
        line.read_exact(&mut [0; EVENT_BYTES])?;
    }
    println!("edges: {count} seen");
    Ok(())
}
