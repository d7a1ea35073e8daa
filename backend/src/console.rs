//! The console device (virtio 1.3, 5.3): terminals of a guest's, and channels to programs in it.

mod client;
mod control;
mod counters;
mod history;
mod message;
mod port;
mod state;

pub use client::{INPUT, Line, MAX_MESSAGE, NO_ROOM, RESIZE};
pub use state::Size;

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Readiness, Ready, Scratch, TransferError};
use crate::persist::{StateArea, StateCell};
use crate::shortage::Shortage;
use crate::tuning::STEPS_PER_CLIENT_LOOK;
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use client::Client;
use counters::Counters;
use history::History;
use port::Port;
use state::{Flags, PortState};
use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// Ports that one device may have.
pub const MAX_PORTS: usize = 8;

// virtio 1.3, 5.3.3.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
const VIRTIO_CONSOLE_F_EMERG_WRITE: u32 = 2;

/// Where `emerg_wr` is in the configuration space (virtio 1.3, 5.3.4).
const EMERG_WRITE: usize = 8;

/// Terminals and channels of a guest's.
pub struct Console {
    identity: Identity,
    queues: QueueSet,
    /// What the driver has accepted, once one of its queues has begun.
    features: u64,
    ports: Vec<Port>,
    /// Of each port.
    state: Vec<PortState>,
    kept: StateCell,
    attaching: Attaching,
    readiness: Readiness,
    next_client: u32,
    scratch: Scratch,
    /// Requests of the control queues that wait for dom0's memory.
    heard: Option<Request>,
    told: Option<Request>,
    /// The size of the first port's terminal has changed.
    size_changed: bool,
    /// Steps since the clients were looked at.
    unlooked: u32,
    counters: Counters,
    shortage: Shortage,
}

/// Attaches clients to a device, which takes them up by its next [`Device::update`]. A clone is of the same device.
#[derive(Clone, Debug, Default)]
pub struct Attaching(Rc<RefCell<Vec<(usize, Line)>>>);

impl Attaching {
    /// Attaches `line` to the port of this number. What there is no such port for is closed.
    pub fn attach(&self, port: usize, line: Line) {
        self.0.borrow_mut().push((port, line));
    }
}

/// What a queue is for (virtio 1.3, 5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The guest reads the port.
    Reads(usize),
    /// The guest writes to the port.
    Writes(usize),
    /// The driver is told of ports.
    Tells,
    /// The driver tells of them.
    Hears,
}

impl Role {
    fn of(queue: usize) -> Self {
        match (queue / 2, queue % 2) {
            (1, 0) => Self::Tells,
            (1, _) => Self::Hears,
            (pair, 0) => Self::Reads(pair.saturating_sub(1)),
            (pair, _) => Self::Writes(pair.saturating_sub(1)),
        }
    }

    fn queue(self) -> usize {
        let pair = |port: usize| if port == 0 { 0 } else { 2 * port + 2 };
        match self {
            Self::Reads(port) => pair(port),
            Self::Writes(port) => pair(port) + 1,
            Self::Tells => 2,
            Self::Hears => 3,
        }
    }
}

impl Console {
    pub const DEVICE_TYPE: DeviceType = DeviceType(VIRTIO_ID_CONSOLE);

    /// The largest size of each of its queues.
    pub const QUEUE_SIZE: u16 = 128;

    /// Bytes of the memory that each port keeps beyond its process.
    pub const HISTORY_BYTES: usize = History::BYTES;

    /// The sizes of the queues of a device with ports of these names.
    pub fn queue_sizes(names: &[Option<String>]) -> Vec<u16> {
        let count = match Self::is_multiport(names) {
            true => 2 * (names.len() + 1),
            false => 2,
        };
        vec![Self::QUEUE_SIZE; count]
    }

    /// One console needs no control queues.
    fn is_multiport(names: &[Option<String>]) -> bool {
        !matches!(names, [None])
    }

    /// Bytes of the cell that a device with so many ports keeps beyond its process.
    pub const fn kept_bytes(ports: usize) -> usize {
        StateCell::bytes(ports * PortState::BYTES)
    }

    /// A device with ports of these names, of which there are one to [`MAX_PORTS`]; those without one are consoles. `kept` (a
    /// cell in [`Console::kept_bytes`]) and `histories` ([`Console::HISTORY_BYTES`] each) outlive it.
    ///
    /// # Errors
    ///
    /// The system's, or if `kept` is of another device.
    pub fn new(
        names: Vec<Option<String>>,
        kept: StateCell,
        histories: Vec<StateArea>,
    ) -> io::Result<Self> {
        let bytes = kept.load().map_err(io::Error::other)?;
        let mut state = state::read(&bytes, names.len()).ok_or_else(|| {
            io::Error::other("what is kept of the console's ports is damaged, or of other ports")
        })?;
        // Whoever was there when another process died is so no more.
        for (port, name) in state.iter_mut().zip(&names) {
            if name.is_some() && port.flags.has(Flags::READY) {
                port.flags |= Flags::TELL_OPEN;
            }
        }
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_CONSOLE_F_SIZE
            | 1 << VIRTIO_CONSOLE_F_EMERG_WRITE;
        if Self::is_multiport(&names) {
            features |= 1 << VIRTIO_CONSOLE_F_MULTIPORT;
        }
        let queue_sizes = Self::queue_sizes(&names);
        let histories = histories.into_iter().map(History::new);
        let ports = names.into_iter().zip(histories);
        Ok(Self {
            queues: QueueSet::new(queue_sizes.len()),
            identity: Identity {
                device_type: Self::DEVICE_TYPE,
                features,
                queue_sizes,
            },
            features: 0,
            ports: ports
                .map(|(name, history)| Port::new(name, history))
                .collect(),
            state,
            kept,
            attaching: Attaching::default(),
            readiness: Readiness::new()?,
            next_client: 0,
            scratch: Scratch::new()?,
            heard: None,
            told: None,
            size_changed: false,
            unlooked: 0,
            counters: Counters::default(),
            shortage: Shortage::default(),
        })
    }

    /// What attaches clients from now on.
    pub fn attaching(&self) -> Attaching {
        self.attaching.clone()
    }

    /// Whether the driver uses ports, and control queues.
    fn has_ports(&self) -> bool {
        self.features & 1 << VIRTIO_CONSOLE_F_MULTIPORT != 0
    }

    /// Whether somebody in the guest reads what is written to a port. Without control queues nobody says so.
    fn is_read(&self, port: usize) -> bool {
        !self.has_ports() || self.state[port].flags.has(Flags::OPEN)
    }

    fn keep_state(&self) {
        let kept = self.kept.store(&state::write(&self.state));
        kept.expect("a cell with room for each port");
    }

    fn attach(&mut self, port: usize, line: Line) {
        let Some(to) = self.ports.get(port) else {
            return;
        };
        let has_room = !line.is_visitors() || to.has_room();
        if has_room && let Some(id) = to.outstayed() {
            self.detach(port, &[id]);
        }
        let to = &mut self.ports[port];
        let client = Client::new(line, &to.history, to.is_channel());
        let key = key(port, self.next_client);
        let mut fds = client.fds();
        if !has_room || fds.any(|fd| self.readiness.add(fd, key).is_err()) {
            drop(fds);
            self.counters.turned_away += 1;
            client.turn_away();
            return;
        }
        drop(fds);
        let was_attended = to.is_attended();
        to.add(self.next_client, client);
        self.next_client = self.next_client.wrapping_add(1);
        self.attended(port, was_attended);
    }

    /// Takes up what has happened to clients.
    fn look(&mut self) {
        loop {
            let (ready, has_more) = self.readiness.take();
            for Ready { key, has_ended } in ready {
                let (port, id) = client_of(key);
                let was_attended = self.ports[port].is_attended();
                if self.ports[port].ready(id, has_ended).is_err() {
                    self.detach(port, &[id]);
                }
                self.attended(port, was_attended);
            }
            if !has_more {
                return;
            }
        }
    }

    fn detach(&mut self, port: usize, gone: &[u32]) {
        let was_attended = self.ports[port].is_attended();
        for id in gone {
            if let Some(client) = self.ports[port].remove(*id) {
                client.fds().for_each(|fd| self.readiness.remove(fd));
            }
        }
        self.attended(port, was_attended);
    }

    /// The driver learns whether anyone is at the other end of a port, if that has changed.
    fn attended(&mut self, port: usize, was_attended: bool) {
        let flags = &mut self.state[port].flags;
        if self.ports[port].is_attended() != was_attended && flags.has(Flags::READY) {
            *flags |= Flags::TELL_OPEN;
            self.keep_state();
        }
    }

    fn set_size(&mut self, port: usize, size: Size) {
        let state = &mut self.state[port];
        if state.size == size {
            return;
        }
        state.size = size;
        if state.flags.has(Flags::READY) && !self.ports[port].is_channel() {
            state.flags |= Flags::TELL_SIZE;
        }
        self.size_changed |= port == 0;
        self.keep_state();
    }

    /// Moves what there is to move. Whether it was anything.
    fn transfer(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let mut moved = false;
        if self.has_ports() {
            moved |= self.hear(access)?;
        }
        for port in 0..self.ports.len() {
            let (gone, size) = self.ports[port].read_input();
            self.detach(port, &gone);
            if let Some(size) = size {
                self.set_size(port, size);
            }
            let (is_read, of_port) = (self.is_read(port), &mut self.ports[port]);
            let (scratch, counters) = (&mut self.scratch, &mut self.counters);
            if let Some(queue) = self.queues.get(Role::Writes(port).queue()) {
                moved |= of_port.take_output(queue, scratch, counters, access)?;
            }
            if is_read && let Some(queue) = self.queues.get(Role::Reads(port).queue()) {
                moved |= of_port.give_input(queue, scratch, counters, access)?;
            }
        }
        if self.has_ports() {
            moved |= self.tell(access)?;
        }
        Ok(moved)
    }

    /// Gives clients what the guest has written, see [`Port::flush`]. Whether they can have more now.
    fn flush(&mut self, all: bool) -> bool {
        let mut has_more = false;
        for port in 0..self.ports.len() {
            let (gone, more) = self.ports[port].flush(all, &mut self.counters);
            self.detach(port, &gone);
            has_more |= more;
        }
        has_more
    }

    fn lacks(&mut self, fault: &CopyFault) {
        let doing = "copying a console's bytes";
        self.shortage.note(doing, fault, Instant::now());
    }
}

/// What the client `id` of a port is known by.
fn key(port: usize, id: u32) -> u64 {
    (port as u64) << 32 | u64::from(id)
}

/// The port, and the client of it, that [`key`] has made this of.
fn client_of(key: u64) -> (usize, u32) {
    let port = usize::try_from(key >> 32).expect("a port's number");
    let id = u32::try_from(key & u64::from(u32::MAX)).expect("32 bits");
    (port, id)
}

impl Device for Console {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        // struct virtio_console_config (virtio 1.3, 5.3.4).
        let first = self.state.first().map(|port| port.size);
        let mut space = first.unwrap_or_default().to_bytes().to_vec();
        let ports = u32::try_from(self.ports.len()).expect("few ports");
        space.extend(ports.to_le_bytes());
        read_space(&space, offset, to);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // A character that a guest writes that has no driver yet (virtio 1.3, 5.3.4).
        if offset == EMERG_WRITE
            && let Some(byte) = data.first()
            && let Some(port) = self.ports.first()
        {
            port.history.append_byte(*byte);
            self.counters.output_bytes += 1;
        }
    }

    fn update(&mut self) -> bool {
        // Who is gone makes room.
        self.look();
        let attaching = self.attaching.0.take();
        for (port, line) in attaching {
            self.attach(port, line);
        }
        // Without a driver, nobody takes a step.
        self.flush(true);
        false
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.features = start.features;
        // A buffer that is empty still, a message that is followed once more; output that was taken is told by its mark.
        self.queues.start(index, start, Unfinished::Repeat, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        if self.unlooked.is_multiple_of(STEPS_PER_CLIENT_LOOK) {
            self.look();
        }
        self.unlooked = self.unlooked.wrapping_add(1);
        let (mut step, mut moved) = (Step::default(), false);
        if !self.shortage.holds() {
            match self.transfer(access) {
                Ok(has_moved) => {
                    self.shortage.end();
                    moved = has_moved;
                }
                Err(TransferError::Dom0(fault)) => self.lacks(&fault),
                Err(TransferError::Device(error)) => {
                    self.flush(true);
                    return Err(error);
                }
            }
            step.interrupt = self.queues.publish()?;
        }
        // More may follow what came just now.
        if self.flush(!moved) || moved {
            step.activity = Activity::Working;
        }
        step.config_changed = std::mem::take(&mut self.size_changed);
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        // The event that woke us may have been that of a client, which is told of once.
        self.unlooked = 0;
        let mut step = self.step(access)?;
        let mut more = self.flush(true);
        more |= self.ports.iter().any(Port::can_read) && !self.shortage.holds();
        if !self.shortage.holds() {
            for index in 0..self.queues.count() {
                let role = Role::of(index);
                let is_wanted = match role {
                    Role::Hears => self.has_ports(),
                    Role::Tells => self.has_ports() && self.next_to_tell().is_some(),
                    Role::Writes(port) => self.ports[port].room() > 0,
                    Role::Reads(port) => self.is_read(port) && self.ports[port].has_input(),
                };
                if is_wanted && let Some(queue) = self.queues.get(index) {
                    more |= queue.resume_kicks()? || queue.available()? > 0;
                }
            }
        }
        if more {
            step.activity = Activity::Working;
        }
        Ok(step)
    }

    fn try_again_at(&self) -> Option<Instant> {
        let retries = self.ports.iter().filter_map(|port| port.retry_at);
        retries.chain(self.shortage.try_at()).min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        add(self.readiness.fd(), Interest::Readable);
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        match Role::of(index.get()) {
            Role::Reads(port) => self.ports[port].forget_input(),
            Role::Writes(port) => self.ports[port].forget_output(),
            Role::Tells => self.told = None,
            Role::Hears => self.heard = None,
        }
        let is_busy = self.heard.is_some() || self.told.is_some();
        if !is_busy && !self.ports.iter().any(Port::is_busy) {
            self.shortage.forget();
        }
    }

    fn settle(&mut self) -> bool {
        // Also without a driver there are readers. What others have said is for nobody.
        self.look();
        for port in 0..self.ports.len() {
            let gone = self.ports[port].ended();
            self.detach(port, &gone);
        }
        while self.flush(true) {}
        true
    }

    fn reset(&mut self) {
        self.features = 0;
        for port in &mut self.state {
            port.flags = Flags::default();
        }
        self.keep_state();
    }

    fn warning(&self) -> Option<String> {
        self.shortage.warning()
    }

    fn counters(&self) -> RequestCounters {
        RequestCounters {
            done: self.counters.requests,
            failed: self.counters.malformed,
        }
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        self.counters.list(add);
    }
}
