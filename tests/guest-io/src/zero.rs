//! Zeroes that the disk writes itself.

use anyhow::{Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::OpenOptions;
use std::io::{BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Has the first `bytes` of a disk written with zeroes, and reads them.
pub(crate) fn run(device: &Path, bytes: u64) -> Result<()> {
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_SYNC)
        .open(device)?;
    // Keeps the blocks: without the size the kernel refuses a block device.
    let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&disk, flags, 0, bytes.try_into()?)?;
    for (place, byte) in BufReader::new(disk.take(bytes)).bytes().enumerate() {
        if byte? != 0 {
            bail!("byte {place} is not zero");
        }
    }
    println!("zeroed: {bytes} bytes");
    Ok(())
}
