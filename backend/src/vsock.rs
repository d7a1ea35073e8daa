//! The socket device (virtio 1.3, 5.10): streams between a guest and programs of the host's, which have Unix sockets.

mod connection;
mod connections;
mod counters;
mod flow;
mod greeting;
mod packet;
mod receive;
mod send;
mod stream;

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Scratch, TransferError};
use crate::shortage::Shortage;
use crate::tuning::{FIRST_WAIT, STEPS_PER_CLIENT_LOOK};
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use connections::Connections;
use receive::Receiver;
use send::Sender;
use std::cell::RefCell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

// virtio 1.3, 5.10.2.
const RECEIVE: usize = 0;
const SEND: usize = 1;
const EVENT: usize = 2;

// virtio 1.3, 5.10.3.
const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.3, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Streams between a guest and programs of the host's.
pub struct Vsock {
    identity: Identity,
    cid: u64,
    queues: QueueSet,
    connections: Connections,
    switchboard: Switchboard,
    sender: Sender,
    receiver: Receiver,
    scratch: Scratch,
    /// The driver is to be told that its connections are no more.
    tells_reset: bool,
    /// A buffer for that.
    event: Option<Request>,
    /// Steps since the programs were looked at.
    unlooked: u32,
    /// When dom0 may have memory for what waits for a program.
    retry_at: Option<Instant>,
    shortage: Shortage,
}

/// Asks for a connection to the program of the host's that has a port: this process can make none. False if nobody hears.
///
/// [`Switchboard::dialled`] answers each by the number that is asked with.
pub struct Dial(Box<dyn Fn(u64, u32) -> bool>);

impl Dial {
    /// Dials at once that were not answered.
    pub const MOST: usize = 16;

    pub fn new(ask: impl Fn(u64, u32) -> bool + 'static) -> Self {
        Self(Box::new(ask))
    }

    fn ask(&self, number: u64, port: u32) -> bool {
        (self.0)(number, port)
    }
}

/// Brings connections to a device, which takes them up by its next [`Device::update`] or step. A clone is of the same device.
#[derive(Clone, Debug, Default)]
pub struct Switchboard(Rc<RefCell<Vec<Brought>>>);

#[derive(Debug)]
enum Brought {
    Visitor(OwnedFd),
    Dialled(u64, Option<OwnedFd>),
}

impl Switchboard {
    /// A program has connected, by a socket that does not block, and says to which port of the guest's. Without a driver in the
    /// guest it is closed.
    pub fn visit(&self, socket: OwnedFd) {
        self.0.borrow_mut().push(Brought::Visitor(socket));
    }

    /// What the dial of this number has come to: a socket that does not block, or nothing if nobody takes it.
    pub fn dialled(&self, number: u64, socket: Option<OwnedFd>) {
        self.0.borrow_mut().push(Brought::Dialled(number, socket));
    }
}

impl Vsock {
    pub const DEVICE_TYPE: DeviceType = DeviceType(VIRTIO_ID_VSOCK);

    /// The largest size of each of its queues.
    pub const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

    /// The device of the guest that has the number `cid`. With `served`, an earlier process had it, whose connections are no more.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(cid: u64, served: bool, dial: Dial) -> io::Result<Self> {
        Ok(Self {
            identity: Identity {
                device_type: Self::DEVICE_TYPE,
                features: 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_VSOCK_F_STREAM,
                queue_sizes: Self::QUEUE_SIZES.to_vec(),
            },
            cid,
            queues: QueueSet::new(Self::QUEUE_SIZES.len()),
            connections: Connections::new(cid, dial)?,
            switchboard: Switchboard::default(),
            sender: Sender::new()?,
            receiver: Receiver::new()?,
            scratch: Scratch::new()?,
            tells_reset: served,
            event: None,
            unlooked: 0,
            retry_at: None,
            shortage: Shortage::default(),
        })
    }

    /// What brings connections from now on.
    pub fn switchboard(&self) -> Switchboard {
        self.switchboard.clone()
    }

    /// Whether there is a driver that could be told of a connection.
    fn has_driver(&mut self) -> bool {
        self.queues.get(RECEIVE).is_some() && self.queues.get(SEND).is_some()
    }

    /// Moves what there is to move. Whether it was anything.
    fn transfer(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let mut moved = false;
        if self.tells_reset {
            moved |= self.tell_reset(access)?;
        }
        if let Some(queue) = self.queues.get(SEND) {
            moved |= self
                .sender
                .step(queue, self.cid, &mut self.connections, access)?;
        }
        if let Some(queue) = self.queues.get(RECEIVE) {
            moved |= self.receiver.step(queue, &mut self.connections, access)?;
        }
        Ok(moved)
    }

    /// Tells the driver that its connections are no more. Whether it was told.
    fn tell_reset(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let Some(queue) = self.queues.get(EVENT) else {
            return Ok(false);
        };
        let request = match self.event.take() {
            Some(held) => Some(held),
            None => queue.pop()?,
        };
        let Some(request) = request else {
            return Ok(false);
        };
        let written = match self
            .scratch
            .write(&TRANSPORT_RESET, &request.writable, access)
        {
            Err(fault) if fault.is_dom0s() => {
                self.event = Some(request);
                return Err(TransferError::Dom0(fault));
            }
            written => written.unwrap_or(0),
        };
        // A buffer that is too small for it comes back empty, and the next one has it.
        match written == TRANSPORT_RESET.len() {
            true => self.tells_reset = false,
            false => self.connections.counters.malformed += 1,
        }
        let written = if self.tells_reset { 0 } else { written };
        queue.complete(request.finish(written))?;
        Ok(true)
    }

    /// Takes up what was brought.
    fn take_up(&mut self) {
        let brought = self.switchboard.0.take();
        let has_driver = self.has_driver();
        for brought in brought {
            match brought {
                Brought::Visitor(socket) if has_driver => self.connections.visit(socket),
                Brought::Visitor(_) => self.connections.counters.refused += 1,
                Brought::Dialled(number, socket) => self.connections.dialled(number, socket),
            }
        }
    }

    /// Takes up what programs have written, and writes what they had no room for. Whether there may be more of that.
    fn look(&mut self) -> bool {
        self.take_up();
        let may_be_more = self.connections.look();
        if self.retry_at.take_if(|at| *at <= Instant::now()).is_some() {
            self.connections.retry();
        }
        // A look before that time does not put it off: a device that is busy looks often.
        let again = || Instant::now() + FIRST_WAIT;
        self.retry_at = match self.connections.lacks() {
            true => self.retry_at.or_else(|| Some(again())),
            false => None,
        };
        may_be_more
    }
}

impl Device for Vsock {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        // struct virtio_vsock_config (virtio 1.3, 5.10.4).
        read_space(&self.cid.to_le_bytes(), offset, to);
    }

    fn update(&mut self) -> bool {
        // Also without a driver, which takes no step.
        self.take_up();
        false
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        // What is sent once more is of connections that are no more; a buffer is empty still.
        self.queues.start(index, start, Unfinished::Repeat, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        if self.unlooked.is_multiple_of(STEPS_PER_CLIENT_LOOK) && self.look() {
            // The next step looks again.
            self.unlooked = u32::MAX;
            step.activity = Activity::Working;
        }
        self.unlooked = self.unlooked.wrapping_add(1);
        if self.shortage.holds() {
            return Ok(step);
        }
        match self.transfer(access) {
            Ok(moved) => {
                self.shortage.end();
                if moved {
                    step.activity = Activity::Working;
                }
            }
            Err(TransferError::Dom0(fault)) => {
                let doing = "copying a socket device's packets";
                self.shortage.note(doing, &fault, Instant::now());
            }
            Err(TransferError::Device(error)) => return Err(error),
        }
        step.interrupt = self.queues.publish()?;
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        // What woke us may have been what a program has written, which is told of once.
        self.unlooked = 0;
        let mut step = self.step(access)?;
        if self.shortage.holds() {
            return Ok(step);
        }
        let wanted = [
            self.connections.has_more(),
            self.connections.room_for_answers() > 0,
            self.tells_reset,
        ];
        for (index, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
            if let Some(queue) = self.queues.get(index)
                && (queue.resume_kicks()? || queue.available()? > 0)
            {
                step.activity = Activity::Working;
            }
        }
        Ok(step)
    }

    fn try_again_at(&self) -> Option<Instant> {
        self.retry_at
            .into_iter()
            .chain(self.shortage.try_at())
            .min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        add(self.connections.fd(), Interest::Readable);
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        match index.get() {
            RECEIVE => self.receiver.forget(),
            SEND => self.sender.forget(),
            _ => self.event = None,
        }
        // What was on its way by that queue is lost, and streams that miss a piece are none.
        self.connections.end_all();
        if !self.receiver.is_busy() && !self.sender.is_busy() && self.event.is_none() {
            self.shortage.forget();
        }
    }

    fn settle(&mut self) -> bool {
        !self.look()
    }

    fn reset(&mut self) {
        self.tells_reset = false;
        self.connections.end_all();
    }

    fn warning(&self) -> Option<String> {
        self.shortage.warning()
    }

    fn counters(&self) -> RequestCounters {
        RequestCounters {
            done: self.connections.counters.packets,
            failed: self.connections.counters.malformed,
        }
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        self.connections.counters.list(add);
    }
}
