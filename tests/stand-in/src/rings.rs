//! The queue: a disk's requests, and what is done to its rings.

use crate::manner::Moment;
use anyhow::Result;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const SECTOR: u64 = 512;
const LARGEST: u16 = 1024;

pub(crate) struct Ring {
    queue: Queue,
    image: File,
    /// Threads that go on with it were started.
    is_busy: bool,
}

impl Ring {
    pub(crate) fn new(image: File) -> Self {
        Self {
            queue: Queue::new(LARGEST).expect("a queue size"),
            image,
            is_busy: false,
        }
    }

    pub(crate) fn set_size(&mut self, size: u16) {
        self.queue.set_size(size);
    }

    pub(crate) fn set_event_index(&mut self, is_used: bool) {
        self.queue.set_event_idx(is_used);
    }

    pub(crate) fn set_base(&mut self, base: u16) {
        self.queue.set_next_avail(base);
        self.queue.set_next_used(base);
    }

    pub(crate) fn set_addresses(
        &mut self,
        descriptors: u64,
        available: u64,
        used: u64,
    ) -> Result<()> {
        self.queue
            .try_set_desc_table_address(GuestAddress(descriptors))?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(available))?;
        self.queue.try_set_used_ring_address(GuestAddress(used))?;
        self.queue.set_ready(true);
        Ok(())
    }

    pub(crate) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    pub(crate) fn stop(&mut self) {
        self.queue.set_ready(false);
    }

    /// Serves what is available, or does what the moment has in place of that.
    pub(crate) fn serve(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        call: &OwnedFd,
        kick: &OwnedFd,
        moment: Option<Moment>,
    ) -> Result<()> {
        if !self.queue.ready() {
            return Ok(());
        }
        match moment {
            None | Some(Moment::Shrinks | Moment::Punches) => self.serve_disk(memory)?,
            Some(Moment::Idle) => return Ok(()),
            Some(Moment::Calls | Moment::Blocks) => {
                self.serve_disk(memory)?;
                if !std::mem::replace(&mut self.is_busy, true) {
                    annoy(call.try_clone()?, kick, moment)?;
                }
            }
            Some(Moment::Scribbles) => {
                if !std::mem::replace(&mut self.is_busy, true) {
                    let memory = Arc::clone(memory);
                    std::thread::spawn(move || scribble(&memory));
                }
            }
            Some(misuse) => self.misuse(memory, misuse)?,
        }
        rustix::io::write(call, &1u64.to_ne_bytes())?;
        Ok(())
    }

    fn serve_disk(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        loop {
            self.queue.disable_notification(memory)?;
            while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let parts: Vec<Descriptor> = chain.collect();
                let written = self.carry_out(memory, &parts)?;
                self.queue.add_used(memory, head, written)?;
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(());
            }
        }
    }

    /// One request of a disk (virtio 1.3, 5.2.6): the bytes that were written.
    fn carry_out(&self, memory: &GuestMemoryMmap, parts: &[Descriptor]) -> Result<u32> {
        let (Some(header), Some(status)) = (parts.first(), parts.last()) else {
            return Ok(0);
        };
        let kind: u32 = memory.read_obj(header.addr())?;
        let sector: u64 = memory.read_obj(GuestAddress(header.addr().0 + 8))?;
        let mut place = u64::from_le(sector) * SECTOR;
        let mut written = 1;
        let mut outcome = VIRTIO_BLK_S_OK;
        for part in &parts[1..parts.len() - 1] {
            let mut bytes = vec![0; part.len() as usize];
            let moved = match u32::from_le(kind) {
                VIRTIO_BLK_T_IN => self.image.read_exact_at(&mut bytes, place).map(|()| {
                    written += part.len();
                    memory.write_slice(&bytes, part.addr())
                }),
                VIRTIO_BLK_T_OUT => {
                    memory.read_slice(&mut bytes, part.addr())?;
                    self.image.write_all_at(&bytes, place).map(Ok)
                }
                _ => Ok(Ok(())),
            };
            match moved {
                Ok(stored) => stored?,
                Err(_) => outcome = VIRTIO_BLK_S_IOERR,
            }
            place += u64::from(part.len());
        }
        if !matches!(
            u32::from_le(kind),
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_FLUSH
        ) {
            outcome = VIRTIO_BLK_S_UNSUPP;
        }
        memory.write_obj(u8::try_from(outcome)?, status.addr())?;
        Ok(written)
    }

    fn misuse(&mut self, memory: &GuestMemoryMmap, misuse: Moment) -> Result<()> {
        let size = self.queue.size();
        let used = self.queue.used_ring();
        let head = self
            .queue
            .pop_descriptor_chain(memory)
            .map(|chain| chain.head_index());
        let next = self.queue.next_used();
        let element = |index: u16, id: u32, len: u32| {
            let slot = u64::from(next.wrapping_add(index) % size);
            let element = [id, len].map(u32::to_le_bytes).concat();
            memory.write_slice(&element, GuestAddress(used + 4 + 8 * slot))
        };
        let head = u32::from(head.unwrap_or(0));
        let ahead = match misuse {
            Moment::UnknownId => {
                element(0, u32::from(size) - 1, 1)?;
                1
            }
            Moment::HugeId => {
                element(0, 0x8000_0000 | head, 1)?;
                1
            }
            Moment::Twice => {
                element(0, head, 1)?;
                element(1, head, 1)?;
                2
            }
            Moment::TooLong => {
                element(0, head, u32::MAX)?;
                1
            }
            Moment::IndexAhead => size,
            _ => u16::MAX,
        };
        let index = next.wrapping_add(ahead).to_le();
        memory.write_obj(index, GuestAddress(used + 2))?;
        Ok(())
    }
}

/// Writes all over the memory for a while.
fn scribble(memory: &GuestMemoryMmap) {
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..200 {
        for region in memory.iter() {
            // The rings, and the beginning of the data.
            for place in (0..region.len().min(256 << 10)).step_by(8) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = GuestAddress(region.start_addr().0 + place);
                let _ = memory.write_obj(word, at);
            }
        }
    }
}

/// Calls without end, or makes whoever uses the descriptors wait.
fn annoy(call: OwnedFd, kick: &OwnedFd, moment: Option<Moment>) -> Result<()> {
    if moment == Some(Moment::Calls) {
        std::thread::spawn(move || {
            for _ in 0..1_000_000 {
                let _ = rustix::io::write(&call, &1u64.to_ne_bytes());
            }
        });
        return Ok(());
    }
    for descriptor in [&call, kick] {
        let flags = fcntl_getfl(descriptor)?;
        fcntl_setfl(descriptor, flags - OFlags::NONBLOCK)?;
    }
    // As far as it goes: another write waits until somebody has read.
    std::thread::spawn(move || {
        let _ = rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes());
        let _ = rustix::io::write(&call, &1u64.to_ne_bytes());
    });
    Ok(())
}
