//! The connections of a device: those who connect, those who are connected, and what the guest is told of them.

use super::Dial;
use super::connection::{Connection, Fate};
use super::counters::Counters;
use super::greeting::{self, Greeted, Greeting};
use super::packet::{Credit, Operation, Packet, Ports, Unfit};
use super::stream::{Stream, Taken};
use crate::engine::{Readiness, Ready};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use vm_memory::{Bytes, VolatileSlice};

/// Connections at once, also those that the guest has ended and whose data is on its way. Each may hold
/// [`VSOCK_BUFFER`](crate::tuning::VSOCK_BUFFER) bytes of dom0's memory.
const MAX_CONNECTIONS: usize = 256;
/// With so many, programs begin no other one, so that the guest can.
const MAX_VISITED: usize = 192;
/// Programs of the host's that have connected and not said to which port.
const MAX_VISITORS: usize = 32;
/// Looks at what has happened to programs' ends in a step: the guest's other devices wait meanwhile.
const LOOKS: usize = 2;
/// Answers to packets of no connection, which may wait for buffers of the guest's: as long as there are so many, it is heard
/// no more (virtio 1.3, 5.10.6.2).
const MAX_ANSWERS: usize = 64;

/// The first port of the host's that a connection has that begins there.
const FIRST_PORT: u32 = 1 << 30;

pub(super) struct Connections {
    cid: u64,
    visitors: BTreeMap<u64, (Stream, Greeting)>,
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<Ports, u64>,
    /// Of connections that the guest has ended: what it had sent goes to the program still.
    draining: BTreeMap<u64, Stream>,
    /// What connects, visits or drains next is known by this.
    next: u64,
    next_port: u32,
    /// Those that may have something for the guest, in the order in which they get to it.
    ready: VecDeque<u64>,
    /// The guest is to be told that there are no such connections.
    resets: VecDeque<Ports>,
    readiness: Readiness,
    dial: Dial,
    /// Dials that were not answered, and connections that wait for that.
    dialling: usize,
    to_dial: VecDeque<u64>,
    pub(super) counters: Counters,
}

/// A packet for the guest that was written to where it is copied from.
pub(super) struct Filled {
    pub(super) len: usize,
    /// The connection that it is of.
    pub(super) of: Option<u64>,
}

impl Connections {
    /// # Errors
    ///
    /// The system's.
    pub(super) fn new(cid: u64, dial: Dial) -> io::Result<Self> {
        Ok(Self {
            cid,
            visitors: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            draining: BTreeMap::new(),
            next: 0,
            next_port: FIRST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            readiness: Readiness::new()?,
            dial,
            dialling: 0,
            to_dial: VecDeque::new(),
            counters: Counters::default(),
        })
    }

    /// Readable when [`Connections::look`] has something to take up.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.readiness.fd()
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_more(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// How many packets may be taken of the guest now.
    pub(super) fn room_for_answers(&self) -> usize {
        MAX_ANSWERS.saturating_sub(self.resets.len())
    }

    /// Connections that there are, for dom0's memory.
    fn count(&self) -> usize {
        self.connections.len() + self.draining.len()
    }

    /// Whether dom0 has no memory for what waits for a program.
    pub(super) fn lacks(&self) -> bool {
        self.connections.values().any(Connection::lacks)
            || self.draining.values().any(Stream::lacks)
    }

    /// Writes once more what dom0 had no memory for.
    pub(super) fn retry(&mut self) {
        let of_guest = self.connections.iter().filter(|(_, one)| one.lacks());
        let of_nobody = self.draining.iter().filter(|(_, one)| one.lacks());
        let lacking: Vec<_> = of_guest
            .map(|(id, _)| id)
            .chain(of_nobody.map(|(id, _)| id))
            .copied()
            .collect();
        for key in lacking {
            self.take_up(Ready {
                key,
                has_ended: false,
            });
        }
    }

    /// Forgets them all: the guest is told of none.
    pub(super) fn end_all(&mut self) {
        for (stream, _) in std::mem::take(&mut self.visitors).into_values() {
            self.readiness.remove(stream.fd());
        }
        for (id, connection) in std::mem::take(&mut self.connections) {
            self.let_go(id, connection);
        }
        self.by_ports.clear();
        self.to_dial.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// A program of the host's has connected.
    pub(super) fn visit(&mut self, fd: OwnedFd) {
        let stream = Stream::new(fd);
        // One that says nothing makes room for one that may.
        if self.visitors.len() >= MAX_VISITORS
            && let Some((_, (oldest, _))) = self.visitors.pop_first()
        {
            self.readiness.remove(oldest.fd());
            self.counters.refused += 1;
        }
        if self.count() >= MAX_VISITED || self.readiness.add(stream.fd(), self.next).is_err() {
            self.counters.refused += 1;
            return;
        }
        self.visitors
            .insert(self.next, (stream, Greeting::default()));
        self.next += 1;
    }

    /// The dial of connection `id` has brought this.
    pub(super) fn dialled(&mut self, id: u64, brought: Option<OwnedFd>) {
        self.dialling = self.dialling.saturating_sub(1);
        self.dial_next();
        let Some(connection) = self
            .connections
            .get_mut(&id)
            .filter(|one| one.is_dialling())
        else {
            return;
        };
        let stream = brought.map(Stream::new);
        match stream.filter(|stream| self.readiness.add(stream.fd(), id).is_ok()) {
            Some(stream) => {
                connection.accepted(stream);
                self.counters.connections += 1;
                self.queue(id);
            }
            None => {
                self.counters.refused += 1;
                self.reset(id);
            }
        }
    }

    /// Takes up what has happened to programs' ends. Whether there may be more of that.
    pub(super) fn look(&mut self) -> bool {
        let mut may_be_more = true;
        for _ in 0..LOOKS {
            if may_be_more {
                let (ready, has_more) = self.readiness.take();
                may_be_more = has_more;
                ready.into_iter().for_each(|ready| self.take_up(ready));
            }
        }
        may_be_more
    }

    fn take_up(&mut self, Ready { key, has_ended }: Ready) {
        if let Some(connection) = self.connections.get_mut(&key) {
            let fate = connection.ready(has_ended);
            self.meet(key, fate);
        } else if let Some(stream) = self.draining.get_mut(&key) {
            stream.ready();
            if stream.flush().is_err() || stream.is_flushed() {
                self.draining.remove(&key);
            }
        } else if self.visitors.contains_key(&key) {
            self.greet(key, has_ended);
        }
    }

    /// Hears a visitor, which may have left.
    fn greet(&mut self, id: u64, has_left: bool) {
        let Some((stream, greeting)) = self.visitors.get_mut(&id) else {
            return;
        };
        stream.ready();
        let mut byte = 0;
        let greeted = loop {
            match stream.read_byte(&mut byte) {
                Taken::Nothing => return,
                Taken::End => break Greeted::Wrong,
                Taken::Bytes(_) => match greeting.add(byte) {
                    Greeted::NotYet => {}
                    greeted => break greeted,
                },
            }
        };
        let Some((stream, _)) = self.visitors.remove(&id) else {
            return;
        };
        let port = match greeted {
            Greeted::Port(port) if !has_left && self.count() < MAX_VISITED => port,
            _ => {
                self.readiness.remove(stream.fd());
                self.counters.refused += 1;
                return;
            }
        };
        let ports = Ports {
            host: self.free_port(port),
            guest: port,
        };
        self.by_ports.insert(ports, id);
        self.connections
            .insert(id, Connection::calling(ports, stream));
        self.queue(id);
    }

    /// A port of the host's by which there is no connection to the guest's port `guest`.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The guest has sent what is no packet of a stream.
    pub(super) fn heard_unfit(&mut self, unfit: Unfit) {
        self.counters.malformed += 1;
        if let Unfit::Foreign(ports) = unfit {
            match self.by_ports.get(&ports) {
                Some(id) => self.meet(*id, Fate::Broken),
                None => self.resets.push_back(ports),
            }
        }
    }

    /// The guest has sent `packet`, with `data`.
    pub(super) fn heard(&mut self, packet: Packet, data: &VolatileSlice<'_>) {
        let ports = packet.ports;
        match (self.by_ports.get(&ports).copied(), packet.operation) {
            (Some(id), _) => {
                let Some(connection) = self.connections.get_mut(&id) else {
                    return;
                };
                let counters = &mut self.counters;
                let fate = connection.heard(packet, data, |stream| {
                    counters.connections += 1;
                    stream.say(&greeting::accepted(ports.host))
                });
                if packet.operation == Operation::Data && fate == Fate::GoesOn {
                    counters.sent_bytes += u64::from(packet.len);
                }
                self.meet(id, fate);
            }
            (None, Operation::Request) => self.wanted(ports, packet.credit),
            // Nobody answers a reset by another.
            (None, Operation::Reset) => {}
            (None, _) => self.resets.push_back(ports),
        }
    }

    /// The guest wants a connection to a program of the host's.
    fn wanted(&mut self, ports: Ports, credit: Credit) {
        if self.count() >= MAX_CONNECTIONS {
            self.counters.refused += 1;
            self.resets.push_back(ports);
            return;
        }
        let id = self.next;
        self.next += 1;
        self.by_ports.insert(ports, id);
        self.connections
            .insert(id, Connection::wanted(ports, credit));
        self.to_dial.push_back(id);
        self.dial_next();
    }

    /// Asks for what connections wait for, as far as that may be.
    fn dial_next(&mut self) {
        while self.dialling < Dial::MOST
            && let Some(id) = self.to_dial.pop_front()
        {
            let Some(connection) = self.connections.get(&id) else {
                continue;
            };
            match self.dial.ask(id, connection.ports.host) {
                true => self.dialling += 1,
                false => {
                    self.counters.refused += 1;
                    self.reset(id);
                }
            }
        }
    }

    /// Does with connection `id` what is to become of it.
    fn meet(&mut self, id: u64, fate: Fate) {
        match fate {
            Fate::GoesOn => self.queue(id),
            Fate::Broken => {
                self.counters.resets += 1;
                self.reset(id);
            }
            Fate::Finished => self.reset(id),
            Fate::Ended => {
                if let Some(connection) = self.remove(id) {
                    self.let_go(id, connection);
                }
            }
        }
    }

    /// Closes a connection's stream, once what the guest had sent before it ended it in order has gone.
    fn let_go(&mut self, id: u64, connection: Connection) {
        let drains = connection.has_to_drain();
        let Some(stream) = connection.into_stream() else {
            return;
        };
        match drains {
            true => drop(self.draining.insert(id, stream)),
            false => self.readiness.remove(stream.fd()),
        }
    }

    /// Ends connection `id`, and tells the guest, if that knows of it.
    fn reset(&mut self, id: u64) {
        if let Some(connection) = self.remove(id) {
            if connection.is_known() {
                self.resets.push_back(connection.ports);
            }
            if let Some(stream) = connection.into_stream() {
                self.readiness.remove(stream.fd());
            }
        }
    }

    fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        self.by_ports.remove(&connection.ports);
        if connection.is_queued {
            self.ready.retain(|other| *other != id);
        }
        if connection.is_dialling() {
            self.to_dial.retain(|other| *other != id);
        }
        Some(connection)
    }

    /// Has connection `id` get to the guest, if it has something for it.
    fn queue(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.has_more()
            && !std::mem::replace(&mut connection.is_queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Something that was filled in for connection `id` cannot be given to the guest: what follows would not follow on it.
    pub(super) fn lost(&mut self, id: u64) {
        self.meet(id, Fate::Broken);
    }

    /// Writes the guest's next packet to `room`, which has more than a header.
    pub(super) fn fill(&mut self, room: &VolatileSlice<'_>) -> Option<Filled> {
        let (packet, of) = self.next_packet(room)?;
        let header = packet.to_guest(self.cid);
        room.write_slice(&header, 0).expect("room for a header");
        let len = packet.len as usize;
        self.counters.received_bytes += len as u64;
        Some(Filled {
            len: Packet::HEADER + len,
            of,
        })
    }

    fn next_packet(&mut self, room: &VolatileSlice<'_>) -> Option<(Packet, Option<u64>)> {
        if let Some(ports) = self.resets.pop_front() {
            let reset = Packet {
                ports,
                operation: Operation::Reset,
                credit: Credit::default(),
                len: 0,
            };
            return Some((reset, None));
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.is_queued = false;
            let mut room = room.offset(Packet::HEADER).expect("room for a header");
            if let Some(packet) = connection.next(&mut room) {
                self.queue(id);
                return Some((packet, Some(id)));
            }
        }
        None
    }
}
