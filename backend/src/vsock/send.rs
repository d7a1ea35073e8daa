//! Packets of a driver's (virtio 1.3, 5.10.6.2).

use super::connections::Connections;
use super::packet::{Packet, Unfit};
use crate::device::DeviceError;
use crate::engine::{TransferError, copy};
use crate::tuning::{MAX_COPIES, PACKET_DATA, PACKETS};
use crate::virtqueue::{ActiveQueue, Request};
use std::io;
use std::ops::Range;
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess, PAGE_SIZE};

/// The longest packet.
const LONGEST: usize = Packet::HEADER + Packet::MAX_DATA;

/// Packets on their way from the driver.
pub(super) struct Sender {
    memory: MmapRegion<()>,
    used: usize,
    packets: Vec<Outgoing>,
    operations: Vec<CopyOp>,
}

struct Outgoing {
    request: Request,
    /// Nothing, if it has a length that no packet has.
    bytes: Range<usize>,
}

impl Sender {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            memory: MmapRegion::new(PACKET_DATA).map_err(io::Error::other)?,
            used: 0,
            packets: Vec::new(),
            operations: Vec::new(),
        })
    }

    /// Packets that were taken are on their way still.
    pub(super) fn is_busy(&self) -> bool {
        !self.packets.is_empty()
    }

    /// The queue is no more; nor are the packets that came from there.
    pub(super) fn forget(&mut self) {
        self.used = 0;
        self.packets.clear();
    }

    /// Takes packets off the driver's queue, and has `connections` hear them. Whether there were any.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn step(
        &mut self,
        queue: &mut ActiveQueue,
        cid: u64,
        connections: &mut Connections,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, TransferError> {
        // Those that dom0 could not copy before go first, and alone.
        if self.packets.is_empty() {
            self.gather(queue, connections.room_for_answers())?;
        }
        if self.packets.is_empty() {
            return Ok(false);
        }
        self.operations.clear();
        for Outgoing { request, bytes } in &self.packets {
            let (len, at, operations) = (bytes.len(), bytes.start, &mut self.operations);
            request
                .readable
                .copies(Direction::FromGuest, 0, len, at, operations);
        }
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations).map_err(TransferError::Dom0)?;
        self.hand_on(queue, cid, connections)?;
        Ok(true)
    }

    /// Takes packets, at most `most`, each of which may have an answer.
    fn gather(&mut self, queue: &mut ActiveQueue, most: usize) -> Result<(), DeviceError> {
        let mut copies = 0;
        while self.packets.len() < most.min(PACKETS)
            && copies < MAX_COPIES
            && self.used + PAGE_SIZE + LONGEST <= self.memory.len()
        {
            let Some(request) = queue.pop()? else { break };
            let len = request.readable.len();
            let len = match (Packet::HEADER..=LONGEST).contains(&len) {
                true => len,
                false => 0,
            };
            copies += request.readable.iter().count();
            let start = request.readable.alike(self.used);
            self.used = start + len;
            let bytes = start..self.used;
            self.packets.push(Outgoing { request, bytes });
        }
        Ok(())
    }

    /// Hands on what was copied.
    fn hand_on(
        &mut self,
        queue: &mut ActiveQueue,
        cid: u64,
        connections: &mut Connections,
    ) -> Result<(), DeviceError> {
        let mut operations = self.operations.iter().peekable();
        for Outgoing { request, bytes } in self.packets.drain(..) {
            let of_packet = std::iter::from_fn(|| {
                operations.next_if(|operation| operation.local.start < bytes.end)
            });
            let is_whole =
                of_packet.fold(!bytes.is_empty(), |whole, one| whole & one.result.is_ok());
            let packet = self
                .memory
                .get_slice(bytes.start, bytes.len())
                .expect("ours");
            match is_whole {
                true => hear(&packet, cid, connections),
                false => connections.heard_unfit(Unfit::Malformed),
            }
            connections.counters.packets += 1;
            queue.complete(request.finish(0))?;
        }
        self.used = 0;
        self.operations.clear();
        self.operations.shrink_to(2 * MAX_COPIES);
        Ok(())
    }
}

/// Has `connections` hear a packet: a header, and what is behind it.
fn hear(packet: &VolatileSlice<'_>, cid: u64, connections: &mut Connections) {
    let mut header = [0; Packet::HEADER];
    packet.read_slice(&mut header, 0).expect("a header");
    let behind = packet.offset(Packet::HEADER).expect("a header");
    match Packet::from_guest(&header, cid, behind.len()) {
        Ok(packet) => {
            let data = behind
                .subslice(0, packet.len as usize)
                .expect("no more than there is");
            connections.heard(packet, &data);
        }
        Err(unfit) => connections.heard_unfit(unfit),
    }
}
