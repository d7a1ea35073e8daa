//! One connection between a guest and a program of the host's, and what they have told each other of it.

use super::flow::Flow;
use super::packet::{Credit, Done, Operation, Packet, Ports};
use super::stream::{Gone, Stream, Taken};
use vm_memory::VolatileSlice;

pub(super) struct Connection {
    pub(super) ports: Ports,
    stage: Stage,
    flow: Flow,
    /// What the guest has said that it does no more, and what the program does no more.
    guest: Done,
    host: Done,
    /// Both of the program's directions are closed: when it has no more for the guest, it takes nothing either.
    has_left: bool,
    owes: Owes,
    /// The guest was asked for room.
    has_asked: bool,
    /// It is among those that may have something for the guest.
    pub(super) is_queued: bool,
}

enum Stage {
    /// The guest wants it, and the host is being asked.
    Dialling,
    /// The host wants it, and the guest is being asked.
    Calling(Stream),
    Established(Stream),
}

/// What the guest is to be told.
#[derive(Clone, Copy, Debug, Default)]
struct Owes {
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    GoesOn,
    /// The guest has done what it may not.
    Broken,
    /// Both are done with it: the guest is told so.
    Finished,
    /// The guest has ended it. What it had sent before goes to the program still.
    Ended,
}

impl Connection {
    fn new(ports: Ports, stage: Stage) -> Self {
        Self {
            ports,
            stage,
            flow: Flow::default(),
            guest: Done::default(),
            host: Done::default(),
            has_left: false,
            owes: Owes::default(),
            has_asked: false,
            is_queued: false,
        }
    }

    /// One that the guest has asked for.
    pub(super) fn wanted(ports: Ports, credit: Credit) -> Self {
        let mut connection = Self::new(ports, Stage::Dialling);
        connection.flow.heard(credit);
        connection
    }

    /// One for which the guest is to be asked.
    pub(super) fn calling(ports: Ports, stream: Stream) -> Self {
        let mut connection = Self::new(ports, Stage::Calling(stream));
        connection.owes.request = true;
        connection
    }

    /// Whether the guest has heard of it.
    pub(super) fn is_known(&self) -> bool {
        !self.owes.request
    }

    pub(super) fn is_dialling(&self) -> bool {
        matches!(self.stage, Stage::Dialling)
    }

    /// The host has accepted what the guest wants.
    pub(super) fn accepted(&mut self, stream: Stream) {
        self.stage = Stage::Established(stream);
        self.owes.response = true;
    }

    pub(super) fn stream(&self) -> Option<&Stream> {
        match &self.stage {
            Stage::Dialling => None,
            Stage::Calling(stream) | Stage::Established(stream) => Some(stream),
        }
    }

    pub(super) fn into_stream(self) -> Option<Stream> {
        match self.stage {
            Stage::Dialling => None,
            Stage::Calling(stream) | Stage::Established(stream) => Some(stream),
        }
    }

    /// Takes in a packet of the guest's, with its data.
    pub(super) fn heard(
        &mut self,
        packet: Packet,
        data: &VolatileSlice<'_>,
        accept: impl FnOnce(&mut Stream) -> Result<(), Gone>,
    ) -> Fate {
        self.flow.heard(packet.credit);
        self.has_asked &= self.flow.room() == 0;
        match (&mut self.stage, packet.operation) {
            (_, Operation::Reset) => Fate::Ended,
            (Stage::Calling(_), Operation::Response) => {
                self.establish(accept);
                Fate::GoesOn
            }
            (Stage::Dialling | Stage::Calling(_), Operation::Shutdown(_)) => Fate::Finished,
            (Stage::Established(stream), Operation::Data) => {
                if self.guest.sending || self.flow.received(packet.len).is_err() {
                    return Fate::Broken;
                }
                let written = match self.host.receiving {
                    true => Err(Gone),
                    false => stream.write(data),
                };
                self.passed_on(written);
                Fate::GoesOn
            }
            (Stage::Established(stream), Operation::Shutdown(done)) => {
                self.guest = self.guest.and(done);
                if self.guest.sending {
                    stream.end();
                }
                if self.guest.receiving {
                    stream.end_reading();
                }
                self.flush()
            }
            // Linux says so whenever a program sets its buffer's size.
            (_, Operation::CreditUpdate) => Fate::GoesOn,
            (Stage::Dialling | Stage::Calling(_), Operation::CreditRequest) => Fate::GoesOn,
            (Stage::Established(_), Operation::CreditRequest) => {
                self.owes.credit = true;
                Fate::GoesOn
            }
            _ => Fate::Broken,
        }
    }

    fn establish(&mut self, accept: impl FnOnce(&mut Stream) -> Result<(), Gone>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Dialling);
        if let Stage::Calling(mut stream) = stage {
            let told = accept(&mut stream);
            self.stage = Stage::Established(stream);
            if told.is_err() {
                self.passed_on(Err(Gone));
            }
        }
    }

    /// Something has happened to the program's end; with `has_left`, both of its directions are closed.
    pub(super) fn ready(&mut self, has_left: bool) -> Fate {
        // Where both have ended their directions, it is said of a program that is there too.
        self.has_left |= has_left && !self.guest.sending;
        match &mut self.stage {
            Stage::Dialling => Fate::GoesOn,
            Stage::Calling(stream) => {
                stream.ready();
                match has_left {
                    true => Fate::Finished,
                    false => Fate::GoesOn,
                }
            }
            Stage::Established(stream) => {
                stream.ready();
                let has_no_more = self.host.sending || self.guest.receiving;
                if self.has_left && has_no_more && !self.host.receiving {
                    self.host.receiving = true;
                    self.owes.shutdown = true;
                }
                self.flush()
            }
        }
    }

    /// Writes what waits for the program.
    pub(super) fn flush(&mut self) -> Fate {
        let Stage::Established(stream) = &mut self.stage else {
            return Fate::GoesOn;
        };
        let written = stream.flush();
        let is_flushed = self.passed_on(written);
        match is_flushed && self.guest == Done::ALL {
            true => Fate::Finished,
            false => Fate::GoesOn,
        }
    }

    /// So much has gone to the program, or it takes nothing any more. Whether nothing waits.
    fn passed_on(&mut self, written: Result<usize, Gone>) -> bool {
        match written {
            Ok(len) => self.flow.forwarded(len),
            Err(Gone) => {
                self.flow.forwarded_all();
                if !std::mem::replace(&mut self.host.receiving, true) {
                    self.owes.shutdown = true;
                }
                if let Stage::Established(stream) = &mut self.stage {
                    stream.forget();
                }
            }
        }
        self.stream().is_none_or(Stream::is_flushed)
    }

    /// Whether the guest has ended it in order, and something that it has sent waits.
    pub(super) fn has_to_drain(&self) -> bool {
        self.guest.sending && self.stream().is_some_and(|stream| !stream.is_flushed())
    }

    /// Whether dom0 has no memory for what waits.
    pub(super) fn lacks(&self) -> bool {
        self.stream().is_some_and(Stream::lacks)
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_more(&self) -> bool {
        let Owes {
            request,
            response,
            shutdown,
            credit,
        } = self.owes;
        let owes = request || response || shutdown || credit || self.flow.is_to_be_told();
        owes || self.may_read() && (self.flow.room() > 0 || !self.has_asked)
    }

    /// Whether the program may have something that the guest is to have.
    fn may_read(&self) -> bool {
        match &self.stage {
            Stage::Established(stream) => {
                stream.can_read() && !self.host.sending && !self.guest.receiving
            }
            Stage::Dialling | Stage::Calling(_) => false,
        }
    }

    /// What the guest gets next, of which data is put into `room`.
    pub(super) fn next(&mut self, room: &mut VolatileSlice<'_>) -> Option<Packet> {
        let (operation, len) = self.next_operation(room)?;
        self.flow.sent(len);
        Some(Packet {
            ports: self.ports,
            operation,
            credit: self.flow.tell(),
            len,
        })
    }

    fn next_operation(&mut self, room: &mut VolatileSlice<'_>) -> Option<(Operation, u32)> {
        let take = std::mem::take::<bool>;
        if take(&mut self.owes.request) {
            return Some((Operation::Request, 0));
        }
        if take(&mut self.owes.response) {
            return Some((Operation::Response, 0));
        }
        if self.may_read()
            && let Some(len) = self.read(room)
        {
            return Some((Operation::Data, len));
        }
        if take(&mut self.owes.shutdown) {
            return Some((Operation::Shutdown(self.host), 0));
        }
        if take(&mut self.owes.credit) || self.flow.is_to_be_told() {
            return Some((Operation::CreditUpdate, 0));
        }
        let waits = self.may_read() && self.flow.room() == 0;
        if waits && !std::mem::replace(&mut self.has_asked, true) {
            return Some((Operation::CreditRequest, 0));
        }
        None
    }

    /// Reads what the guest has room for.
    fn read(&mut self, room: &mut VolatileSlice<'_>) -> Option<u32> {
        let len = room.len().min(Packet::MAX_DATA).min(self.flow.room());
        let Stage::Established(stream) = &mut self.stage else {
            return None;
        };
        if len == 0 {
            return None;
        }
        let mut room = room.subslice(0, len).expect("inside");
        match stream.read(&mut room) {
            Taken::Bytes(len) => Some(u32::try_from(len).expect("a packet's")),
            Taken::Nothing => None,
            Taken::End => {
                self.host.sending = true;
                self.host.receiving |= self.has_left;
                self.owes.shutdown = true;
                None
            }
        }
    }
}
