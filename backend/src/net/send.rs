//! Frames of a driver's to the interface (virtio 1.3, 5.1.6.2).

use super::counters::Counters;
use super::frame::{ETHERNET, FrameHeader, MAX_FRAME};
use super::interface::Interface;
use super::transfer::Moved;
use crate::engine::{Limiter, TransferError, copy};
use crate::tap::HEADER;
use crate::tuning::{FRAME_DATA, FRAMES, MAX_COPIES};
use crate::virtqueue::{ActiveQueue, Request};
use std::io;
use std::ops::Range;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess, PAGE_SIZE};

/// A frame of so many bytes is laid so that its pages are copied in one piece each.
const LONG: usize = PAGE_SIZE / 2;

/// The frames of one queue on their way from the driver.
pub(super) struct Sender {
    memory: MmapRegion<()>,
    used: usize,
    frames: Vec<Frame>,
    operations: Vec<CopyOp>,
}

struct Frame {
    request: Request,
    /// Nothing, if it has a length that no frame has.
    bytes: Range<usize>,
}

/// Where frames go.
pub(super) struct Wire<'a> {
    /// None, while the cable is unplugged.
    pub(super) interface: Option<&'a mut dyn Interface>,
    /// What the driver has accepted.
    pub(super) features: u64,
}

impl Sender {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            memory: MmapRegion::new(FRAME_DATA).map_err(io::Error::other)?,
            used: 0,
            frames: Vec::new(),
            operations: Vec::new(),
        })
    }

    /// Frames that were taken are on their way still.
    pub(super) fn is_busy(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The queue is no more; nor are the frames that came from there.
    pub(super) fn forget(&mut self) {
        self.used = 0;
        self.frames.clear();
    }

    /// Takes frames off the driver's queue, and sends them.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn step(
        &mut self,
        queue: &mut ActiveQueue,
        wire: Wire<'_>,
        limiter: &mut Limiter,
        counters: &mut Counters,
        access: &mut dyn GuestAccess,
    ) -> Result<Moved, TransferError> {
        // Those that dom0 could not copy before go first, and alone.
        if self.frames.is_empty() {
            self.gather(queue, limiter)?;
        }
        if self.frames.is_empty() {
            return Ok(Moved::default());
        }
        self.operations.clear();
        for Frame { request, bytes } in &self.frames {
            let operations = &mut self.operations;
            let (len, at) = (bytes.len(), bytes.start);
            request
                .readable
                .copies(Direction::FromGuest, 0, len, at, operations);
        }
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations).map_err(TransferError::Dom0)?;
        self.send(queue, wire, counters)
    }

    fn gather(
        &mut self,
        queue: &mut ActiveQueue,
        limiter: &mut Limiter,
    ) -> Result<(), TransferError> {
        let mut copies = 0;
        while self.frames.len() < FRAMES
            && copies < MAX_COPIES
            && self.used + PAGE_SIZE + MAX_FRAME <= self.memory.len()
            && limiter.admits()
        {
            let Some(request) = queue.pop()? else { break };
            let len = request.readable.len();
            let len = match (HEADER + ETHERNET..=MAX_FRAME).contains(&len) {
                true => len,
                false => 0,
            };
            limiter.spend(len);
            copies += request.readable.iter().count();
            let start = match len < LONG {
                true => self.used,
                false => request.readable.alike(self.used),
            };
            let bytes = start..start + len;
            self.used = bytes.end;
            self.frames.push(Frame { request, bytes });
        }
        Ok(())
    }

    /// Sends what was copied, where there is an interface that takes it.
    fn send(
        &mut self,
        queue: &mut ActiveQueue,
        wire: Wire<'_>,
        counters: &mut Counters,
    ) -> Result<Moved, TransferError> {
        let Wire {
            mut interface,
            features,
        } = wire;
        let mut operations = self.operations.iter().peekable();
        let mut sent = Moved::default();
        for Frame { request, bytes } in self.frames.drain(..) {
            let of_frame = std::iter::from_fn(|| {
                operations.next_if(|operation| operation.local.start < bytes.end)
            });
            let is_whole =
                of_frame.fold(!bytes.is_empty(), |whole, one| whole & one.result.is_ok());
            sent.requests += 1;
            sent.bytes += bytes.len();
            let frame = self
                .memory
                .get_slice(bytes.start, bytes.len())
                .expect("ours");
            let mut header = [0; HEADER];
            let header = match is_whole {
                true => {
                    frame.read_slice(&mut header, 0).expect("a header");
                    FrameHeader(header).to_send(features)
                }
                false => None,
            };
            match (header, &mut interface) {
                (None, _) => counters.malformed += 1,
                (Some(_), None) => counters.unsent += 1,
                (Some(FrameHeader(header)), Some(interface)) => {
                    frame.write_slice(&header, 0).expect("a header");
                    counters.sent(interface.write(&frame), bytes.len() - HEADER);
                }
            }
            queue.complete(request.finish(0))?;
        }
        self.used = 0;
        self.operations.clear();
        self.operations.shrink_to(2 * MAX_COPIES);
        Ok(sent)
    }
}
