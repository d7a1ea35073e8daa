//! Direct I/O at a queue depth, through io_uring.

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// One transfer of a whole buffer.
#[derive(Clone, Copy)]
pub(crate) enum Transfer {
    Read(u64),
    Write(u64),
}

/// A disk, open for direct I/O, with `depth` buffers of `block` bytes.
pub(crate) struct Ring {
    ring: IoUring,
    disk: File,
    memory: Vec<u8>,
    first: usize,
    block: usize,
    pub(crate) bytes: u64,
    pub(crate) depth: usize,
    /// The longest time for which nothing ended, since [`Ring::take_longest_pause`].
    longest_pause: Duration,
}

const ALIGNMENT: usize = 4096;

impl Ring {
    pub(crate) fn open(path: &Path, block: usize, depth: usize) -> Result<Self> {
        let mut disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .with_context(|| path.display().to_string())?;
        let bytes = disk.seek(SeekFrom::End(0))?;
        ensure!(
            bytes >= block as u64,
            "{} has {bytes} bytes",
            path.display()
        );
        let memory = vec![0; block * depth + ALIGNMENT];
        let first = memory.as_ptr().align_offset(ALIGNMENT);
        let ring = IoUring::new(depth.next_power_of_two().try_into()?)?;
        Ok(Self {
            ring,
            disk,
            memory,
            first,
            block,
            bytes,
            depth,
            longest_pause: Duration::ZERO,
        })
    }

    /// The buffer of slot `slot`, below `depth`. It must not be in flight.
    pub(crate) fn buffer(&mut self, slot: usize) -> &mut [u8] {
        let start = self.first + slot * self.block;
        &mut self.memory[start..start + self.block]
    }

    /// Keeps every slot in flight: `next` gives each free slot its transfer, or `None` to leave it free;
    /// `done` takes each one that ended.
    pub(crate) fn run(
        &mut self,
        mut next: impl FnMut(&mut Self, usize) -> Option<Transfer>,
        mut done: impl FnMut(&mut Self, usize, Transfer) -> Result<()>,
    ) -> Result<()> {
        let mut flying = vec![None; self.depth];
        let mut free: Vec<usize> = (0..self.depth).collect();
        loop {
            let mut waiting = Vec::new();
            while let Some(slot) = free.pop() {
                match next(self, slot) {
                    Some(transfer) => {
                        self.push(slot, transfer)?;
                        flying[slot] = Some(transfer);
                    }
                    None => waiting.push(slot),
                }
            }
            free = waiting;
            if free.len() == self.depth {
                return Ok(());
            }
            let began = Instant::now();
            self.ring.submit_and_wait(1)?;
            self.longest_pause = self.longest_pause.max(began.elapsed());
            let ended: Vec<_> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (slot, result) in ended {
                let slot = usize::try_from(slot)?;
                let transfer = flying[slot].take().context("a completion of nothing")?;
                ensure!(
                    usize::try_from(result).is_ok_and(|len| len == self.block),
                    "{} at {}: {}",
                    if matches!(transfer, Transfer::Read(_)) {
                        "read"
                    } else {
                        "write"
                    },
                    match transfer {
                        Transfer::Read(offset) | Transfer::Write(offset) => offset,
                    },
                    if result < 0 {
                        std::io::Error::from_raw_os_error(-result).to_string()
                    } else {
                        format!("{result} bytes")
                    }
                );
                done(self, slot, transfer)?;
                free.push(slot);
            }
        }
    }

    fn push(&mut self, slot: usize, transfer: Transfer) -> Result<()> {
        let disk = types::Fd(self.disk.as_raw_fd());
        let len = self.block.try_into()?;
        let buffer = self.buffer(slot).as_mut_ptr();
        let entry = match transfer {
            Transfer::Read(offset) => opcode::Read::new(disk, buffer, len).offset(offset).build(),
            Transfer::Write(offset) => opcode::Write::new(disk, buffer, len).offset(offset).build(),
        };
        // SAFETY: the slot's buffer is used by nobody else until its completion, and lives as long as the ring.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }?;
        Ok(())
    }

    pub(crate) fn take_longest_pause(&mut self) -> Duration {
        std::mem::take(&mut self.longest_pause)
    }

    pub(crate) fn sync(&mut self) -> Result<()> {
        let began = Instant::now();
        self.disk.sync_data()?;
        self.longest_pause = self.longest_pause.max(began.elapsed());
        Ok(())
    }
}
