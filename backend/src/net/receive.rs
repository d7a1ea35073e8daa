//! Frames from the interface into a driver's buffers (virtio 1.3, 5.1.6.3, 5.1.6.4).

use super::counters::Counters;
use super::filter::{Filter, LOOKED_AT};
use super::frame::{FrameHeader, MAX_FRAME};
use super::interface::Interface;
use super::offloads::Offloads;
use super::transfer::Moved;
use crate::device::DeviceError;
use crate::engine::{Limiter, TransferError, copy};
use crate::tap::HEADER;
use crate::tuning::{FRAME_DATA, FRAMES, MAX_COPIES};
use crate::virtqueue::{ActiveQueue, Request};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess};

/// Where a driver's frames come from, and which of them it gets.
pub(super) struct Source<'a> {
    pub(super) interface: &'a mut dyn Interface,
    pub(super) filter: &'a Filter,
    pub(super) offloads: Offloads,
    /// The link is up.
    pub(super) is_up: bool,
    pub(super) limiter: &'a mut Limiter,
}

/// The frames of one queue on their way to the driver.
pub(super) struct Receiver {
    memory: MmapRegion<()>,
    /// Bytes of the memory that frames have.
    used: usize,
    /// Frames that have their buffers.
    frames: Vec<Frame>,
    /// The last frame that was read, if the driver has not enough buffers for it.
    unplaced: Option<Range<usize>>,
    /// Buffers for the next frame.
    buffers: VecDeque<Request>,
    outlook: Outlook,
    /// Frames that may be at the interface still, and came for an earlier driver.
    stale: usize,
    /// Buffers of the frames that have theirs.
    copies: usize,
    operations: Vec<CopyOp>,
}

struct Frame {
    bytes: Range<usize>,
    buffers: SmallVec<[Request; 1]>,
}

/// Why no further frame was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outlook {
    /// There may be one to be taken at once.
    More,
    /// The interface has none for now, as it has said.
    Dry,
    /// The driver has given too few buffers.
    Starved,
    /// The guest has had its share for now.
    Limited,
}

/// What became of taking frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    Yes,
    /// The driver has given too few buffers yet.
    NotYet,
    /// No buffers of the driver's will ever do.
    Never,
}

impl Receiver {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            memory: MmapRegion::new(FRAME_DATA).map_err(io::Error::other)?,
            used: 0,
            frames: Vec::new(),
            unplaced: None,
            buffers: VecDeque::new(),
            outlook: Outlook::Dry,
            stale: 0,
            copies: 0,
            operations: Vec::new(),
        })
    }

    /// Has the next step look at the interface, whatever that has said.
    pub(super) fn look(&mut self) {
        self.outlook = Outlook::More;
    }

    /// Whether frames wait for buffers.
    pub(super) fn is_starved(&self) -> bool {
        self.outlook == Outlook::Starved
    }

    /// Frames that were read are on their way still.
    pub(super) fn is_busy(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The queue is no more; nor are the frames that were to go there.
    pub(super) fn forget(&mut self) {
        self.used = 0;
        self.frames.clear();
        self.unplaced = None;
        self.copies = 0;
        self.buffers.clear();
        self.outlook = Outlook::Dry;
    }

    /// What the interface holds came for an earlier driver, and is none of the next one's.
    pub(super) fn drain(&mut self) {
        self.stale = STALE;
    }

    /// Takes frames off `interface`, and gives them to the driver.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn step(
        &mut self,
        queue: &mut ActiveQueue,
        source: &mut Source<'_>,
        counters: &mut Counters,
        access: &mut dyn GuestAccess,
    ) -> Result<Moved, TransferError> {
        // Those that dom0 could not copy before go first, and alone.
        if self.frames.is_empty() {
            self.throw_away(source.interface);
            self.gather(queue, source, counters)?;
        }
        let delivered = self.deliver(queue, counters, access)?;
        Ok(Moved {
            has_more: self.outlook == Outlook::More,
            ..delivered
        })
    }

    /// Throws away some of what came for an earlier driver.
    fn throw_away(&mut self, interface: &mut dyn Interface) {
        for _ in 0..self.stale.min(FRAMES) {
            let mut beginning = [0; HEADER];
            self.stale -= 1;
            if let Err(error) = interface.read(&mut (&mut beginning[..]).into())
                && is_last(&error)
            {
                self.stale = 0;
                return;
            }
        }
    }

    /// Reads frames, as many as there are, have room in our memory, and have buffers.
    fn gather(
        &mut self,
        queue: &mut ActiveQueue,
        source: &mut Source<'_>,
        counters: &mut Counters,
    ) -> Result<(), DeviceError> {
        if self.outlook == Outlook::Dry {
            return Ok(());
        }
        self.outlook = Outlook::More;
        if self.stale > 0 {
            return Ok(());
        }
        // Frames that are not wanted count too: somebody may send nothing else.
        for _ in 0..FRAMES {
            let unplaced = match self.unplaced.take() {
                Some(frame) => frame,
                None => {
                    if !source.limiter.admits() {
                        self.outlook = Outlook::Limited;
                        break;
                    }
                    // Without buffers, frames are better off where the kernel bounds them.
                    let Some(start) = self.next_place(queue)? else {
                        self.outlook = Outlook::Starved;
                        break;
                    };
                    if start + MAX_FRAME > self.memory.len() {
                        break;
                    }
                    let frame = match self.read(start, source.interface, counters) {
                        Ok(frame) => frame,
                        Err(error) if is_last(&error) => {
                            self.outlook = Outlook::Dry;
                            break;
                        }
                        // The kernel could not hand this one over; there may be others.
                        Err(_) => continue,
                    };
                    if !self.is_wanted(&frame, queue, source, counters) {
                        continue;
                    }
                    self.used = frame.end;
                    source.limiter.spend(frame.len());
                    frame
                }
            };
            match self.place(unplaced.clone(), queue, source.offloads)? {
                Placed::Yes if self.copies >= MAX_COPIES => break,
                Placed::Yes => {}
                Placed::NotYet => {
                    self.unplaced = Some(unplaced);
                    self.outlook = Outlook::Starved;
                    break;
                }
                Placed::Never => {
                    counters.too_large += 1;
                    self.used = unplaced.start;
                }
            }
        }
        Ok(())
    }

    /// Where the next frame is read to, if there is a buffer for it.
    fn next_place(&mut self, queue: &mut ActiveQueue) -> Result<Option<usize>, DeviceError> {
        if self.buffers.is_empty() {
            self.buffers.extend(queue.pop()?);
        }
        let first = self.buffers.front();
        Ok(first.map(|request| request.writable.alike(self.used)))
    }

    /// The next frame of the interface.
    fn read(
        &mut self,
        start: usize,
        interface: &mut dyn Interface,
        counters: &mut Counters,
    ) -> io::Result<Range<usize>> {
        let mut room = self.memory.get_slice(start, MAX_FRAME).expect("room");
        let read = interface.read(&mut room);
        match &read {
            Ok(_) => counters.interface = None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => counters.interface = Some(error.to_string()),
        }
        read.map(|len| start..start + len.min(MAX_FRAME))
    }

    /// Whether the driver is to have a frame that was read.
    fn is_wanted(
        &self,
        frame: &Range<usize>,
        queue: &ActiveQueue,
        source: &Source<'_>,
        counters: &mut Counters,
    ) -> bool {
        let mut beginning = [0; HEADER + LOOKED_AT];
        let slice = self.memory.as_volatile_slice();
        if frame.len() < beginning.len() || slice.read_slice(&mut beginning, frame.start).is_err() {
            counters.unfit += 1;
            return false;
        }
        let (header, rest) = beginning.split_first_chunk().expect("as many bytes");
        let rest: &[u8; LOOKED_AT] = rest.try_into().expect("as many bytes");
        let by_vlan = queue.has_feature(VIRTIO_NET_F_CTRL_VLAN);
        if !source.is_up || !source.filter.wants(rest, by_vlan) {
            counters.unwanted += 1;
            return false;
        }
        // The interface knows what the driver takes; this one may have come to it before it did.
        if !FrameHeader(*header).may_be_received(source.offloads) {
            counters.unfit += 1;
            return false;
        }
        true
    }

    /// Gives a frame its buffers.
    fn place(
        &mut self,
        bytes: Range<usize>,
        queue: &mut ActiveQueue,
        offloads: Offloads,
    ) -> Result<Placed, DeviceError> {
        let merges = queue.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let most = if merges { queue.size().into() } else { 1 };
        let mut room: usize = self
            .buffers
            .iter()
            .map(|request| request.writable.len())
            .sum();
        while room < bytes.len() {
            if self.buffers.len() >= most {
                return Ok(Placed::Never);
            }
            let Some(request) = queue.pop()? else {
                return Ok(Placed::NotYet);
            };
            room += request.writable.len();
            self.buffers.push_back(request);
        }
        let mut left = bytes.len();
        let mut buffers = SmallVec::new();
        while left > 0 {
            let request = self.buffers.pop_front().expect("buffers of that length");
            left -= left.min(request.writable.len());
            self.copies += request.writable.iter().count();
            buffers.push(request);
        }
        // 5.1.6.4.1: one, where buffers are not merged.
        let count = u16::try_from(buffers.len()).expect("no more than a queue has");
        let mut header = [0; HEADER];
        let slice = self.memory.as_volatile_slice();
        slice.read_slice(&mut header, bytes.start).expect("a frame");
        let FrameHeader(header) = FrameHeader(header).in_buffers(count, offloads);
        slice.write_slice(&header, bytes.start).expect("a frame");
        self.frames.push(Frame { bytes, buffers });
        Ok(Placed::Yes)
    }

    /// Copies the frames that have buffers to the guest, and gives them back with those.
    fn deliver(
        &mut self,
        queue: &mut ActiveQueue,
        counters: &mut Counters,
        access: &mut dyn GuestAccess,
    ) -> Result<Moved, TransferError> {
        if self.frames.is_empty() {
            return Ok(Moved::default());
        }
        self.operations.clear();
        for Frame { bytes, buffers } in &self.frames {
            let mut at = bytes.start;
            for request in buffers {
                let len = request.writable.len().min(bytes.end - at);
                let operations = &mut self.operations;
                request
                    .writable
                    .copies(Direction::ToGuest, 0, len, at, operations);
                at += len;
            }
        }
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations).map_err(TransferError::Dom0)?;
        let mut operations = self.operations.iter().peekable();
        let mut delivered = Moved::default();
        for Frame { bytes, buffers } in self.frames.drain(..) {
            let of_frame = std::iter::from_fn(|| {
                operations.next_if(|operation| operation.local.start < bytes.end)
            });
            let is_whole = of_frame.fold(true, |whole, one| whole & one.result.is_ok());
            counters.received(is_whole, bytes.len() - HEADER);
            delivered.requests += 1;
            delivered.bytes += bytes.len();
            let mut left = bytes.len();
            for request in buffers {
                let len = request.writable.len().min(left);
                left -= len;
                // A buffer that cannot be written comes back empty, and the frame is lost.
                queue.complete(request.finish(if is_whole { len } else { 0 }))?;
            }
        }
        self.copies = 0;
        self.operations.clear();
        self.operations.shrink_to(2 * MAX_COPIES);
        // What is unplaced lies behind all others, and is moved by nobody.
        if self.unplaced.is_none() {
            self.used = 0;
        }
        Ok(delivered)
    }
}

/// Frames that an interface may hold: its queue has 1000 as a rule (`txqueuelen`).
const STALE: usize = 4096;

/// Whether an error of an interface says that there is no further frame for now, or none any more.
fn is_last(error: &io::Error) -> bool {
    let gone = [libc::EBADFD, libc::EFAULT, libc::EIO, libc::ENODEV];
    error.kind() == io::ErrorKind::WouldBlock
        || error
            .raw_os_error()
            .is_some_and(|errno| gone.contains(&errno))
}
