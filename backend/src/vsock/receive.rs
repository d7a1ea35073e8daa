//! Packets for a driver, into its buffers (virtio 1.3, 5.10.6.2).

use super::connections::Connections;
use super::packet::Packet;
use crate::device::DeviceError;
use crate::engine::{TransferError, copy};
use crate::tuning::{MAX_COPIES, PACKET_DATA, PACKETS};
use crate::virtqueue::{ActiveQueue, Request};
use std::io;
use std::ops::Range;
use vm_memory::{MmapRegion, VolatileMemory};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess, PAGE_SIZE};

/// Packets on their way to the driver.
pub(super) struct Receiver {
    memory: MmapRegion<()>,
    used: usize,
    packets: Vec<Incoming>,
    /// A buffer for the next packet.
    buffer: Option<Request>,
    operations: Vec<CopyOp>,
}

struct Incoming {
    request: Request,
    bytes: Range<usize>,
    /// The connection that it is of.
    of: Option<u64>,
}

impl Receiver {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            memory: MmapRegion::new(PACKET_DATA).map_err(io::Error::other)?,
            used: 0,
            packets: Vec::new(),
            buffer: None,
            operations: Vec::new(),
        })
    }

    /// Packets that were filled in are on their way still.
    pub(super) fn is_busy(&self) -> bool {
        !self.packets.is_empty()
    }

    /// The queue is no more; nor are the packets that were to go there.
    pub(super) fn forget(&mut self) {
        self.used = 0;
        self.packets.clear();
        self.buffer = None;
    }

    /// Gives the driver what `connections` have for it. Whether it was anything.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn step(
        &mut self,
        queue: &mut ActiveQueue,
        connections: &mut Connections,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, TransferError> {
        // Those that dom0 could not copy before go first, and alone.
        let given = match self.packets.is_empty() {
            true => self.gather(queue, connections)?,
            false => false,
        };
        if self.packets.is_empty() {
            return Ok(given);
        }
        self.deliver(queue, connections, access)?;
        Ok(true)
    }

    /// Fills in packets, as many as there are, have room in our memory, and have buffers. Whether a buffer came back without one.
    fn gather(
        &mut self,
        queue: &mut ActiveQueue,
        connections: &mut Connections,
    ) -> Result<bool, DeviceError> {
        let (mut copies, mut is_malformed) = (0, false);
        for _ in 0..PACKETS {
            if copies >= MAX_COPIES || !connections.has_more() {
                break;
            }
            let request = match self.buffer.take() {
                Some(held) => held,
                None => match queue.pop()? {
                    Some(request) => request,
                    None => break,
                },
            };
            let room = request
                .writable
                .len()
                .min(Packet::HEADER + Packet::MAX_DATA);
            if room <= Packet::HEADER {
                // Data would never get to the guest by such buffers.
                connections.counters.malformed += 1;
                is_malformed = true;
                queue.complete(request.finish(0))?;
                continue;
            }
            let start = request.writable.alike(self.used);
            if start + PAGE_SIZE + room > self.memory.len() {
                self.buffer = Some(request);
                break;
            }
            let slice = self.memory.get_slice(start, room).expect("room");
            let Some(filled) = connections.fill(&slice) else {
                self.buffer = Some(request);
                break;
            };
            self.used = start + filled.len;
            copies += request.writable.iter().count();
            self.packets.push(Incoming {
                request,
                bytes: start..self.used,
                of: filled.of,
            });
        }
        Ok(is_malformed)
    }

    /// Copies the packets to the guest, and gives them back.
    fn deliver(
        &mut self,
        queue: &mut ActiveQueue,
        connections: &mut Connections,
        access: &mut dyn GuestAccess,
    ) -> Result<(), TransferError> {
        self.operations.clear();
        for Incoming { request, bytes, .. } in &self.packets {
            let (len, at, operations) = (bytes.len(), bytes.start, &mut self.operations);
            request
                .writable
                .copies(Direction::ToGuest, 0, len, at, operations);
        }
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations).map_err(TransferError::Dom0)?;
        let mut operations = self.operations.iter().peekable();
        for Incoming { request, bytes, of } in self.packets.drain(..) {
            let of_packet = std::iter::from_fn(|| {
                operations.next_if(|operation| operation.local.start < bytes.end)
            });
            let is_whole = of_packet.fold(true, |whole, one| whole & one.result.is_ok());
            connections.counters.packets += 1;
            if !is_whole {
                connections.counters.malformed += 1;
                of.into_iter().for_each(|id| connections.lost(id));
            }
            queue.complete(request.finish(if is_whole { bytes.len() } else { 0 }))?;
        }
        self.used = 0;
        self.operations.clear();
        self.operations.shrink_to(2 * MAX_COPIES);
        Ok(())
    }
}
