//! One request on its way: copied in, carried out, copied out, in chunks if it is large.

use super::Serial;
use super::counters::Counters;
use super::disk::Disk;
use super::header::{Command, Erase, HEADER, Status};
use crate::device::DeviceFailure;
use crate::engine::PageRun;
use crate::engine::{Kind, Transfer};
use crate::tuning::CHUNK;
use crate::virtqueue::{Completion, Request, RequestDetail};
use std::io;
use std::ops::Range;
use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_guest_mapping::{CopyOp, Direction};

/// Bytes of what `VIRTIO_BLK_T_GET_ID` returns.
const SERIAL: usize = size_of::<Serial>();

/// Bytes of memory that each request has for its header and status.
pub(super) const HEADER_SLOT: usize = 32;
const _: () = assert!(HEADER < HEADER_SLOT);

/// A request, and how far it has got.
pub(super) struct BlkRequest {
    /// `None` once its queue was stopped: what is under way of it ends, and nothing comes of it.
    pub(super) queue: Option<usize>,
    request: Request,
    /// Tells this request from others.
    id: u16,
    /// A write is stable before it is done.
    write_through: bool,
    /// Known once the header has been copied and parsed.
    command: Option<Command>,
    /// Bytes of data done in earlier chunks.
    done: usize,
    pub(super) status: Option<Status>,
    pub(super) chunk: Chunk,
}

/// What of a request's data is under way.
#[derive(Default)]
pub(super) struct Chunk {
    /// The memory that it is in.
    pub(super) run: Option<PageRun>,
    /// Where data from the driver goes, and data for the driver.
    readable: Range<usize>,
    writable: Range<usize>,
    /// Bytes that the disk has moved so far.
    moved: usize,
    /// They have been written, and are being made stable.
    flushing: bool,
    /// The operations of the batch that brings it in, or takes it out.
    pub(super) copies: Range<usize>,
}

/// What comes next for a request.
#[derive(Debug)]
pub(super) enum Next {
    Disk(Transfer),
    /// The chunk is done, or failed.
    CopyOut,
}

/// Why a request ends with an error status.
pub(super) enum Failure {
    /// The guest asked for what cannot be.
    Guest(Status),
    /// The disk failed.
    Disk(io::Error),
}

impl BlkRequest {
    /// # Errors
    ///
    /// [`DeviceFailure::NoStatus`] for a request that could not even be told that it failed.
    pub(super) fn new(
        queue: usize,
        request: Request,
        id: u16,
        write_through: bool,
    ) -> Result<Self, DeviceFailure> {
        if request.writable.is_empty() {
            return Err(DeviceFailure::NoStatus);
        }
        Ok(Self {
            queue: Some(queue),
            request,
            id,
            write_through,
            command: None,
            done: 0,
            status: None,
            chunk: Chunk::default(),
        })
    }

    fn header_slot(&self) -> usize {
        usize::from(self.id) * HEADER_SLOT
    }

    fn status_place(&self) -> usize {
        self.header_slot() + HEADER
    }

    fn readable_data(&self) -> usize {
        self.request.readable.len().saturating_sub(HEADER)
    }

    fn writable_data(&self) -> usize {
        self.request.writable.len() - 1
    }

    /// Data still to come from the driver, and still to go to it.
    fn data_left(&self) -> (usize, usize) {
        let readable = self.readable_data().saturating_sub(self.done);
        let writable = self.writable_data().saturating_sub(self.done);
        match self.command {
            None => (readable, writable),
            Some(Command::Read { .. }) => (0, writable),
            Some(Command::Write { .. } | Command::Erase(_)) => (readable, 0),
            Some(Command::GetId) => (0, writable.min(SERIAL.saturating_sub(self.done))),
            Some(Command::Flush | Command::Erased { .. }) => (0, 0),
        }
    }

    /// Bytes of memory for the next chunk; it may be none.
    pub(super) fn room(&self) -> usize {
        let (readable, writable) = self.data_left();
        readable.saturating_add(writable).min(CHUNK)
    }

    /// Begins the next chunk, in a run of [`BlkRequest::room`] bytes unless that is none.
    pub(super) fn begin_chunk(&mut self, run: Option<PageRun>) {
        let start = run.as_ref().map_or(0, PageRun::start);
        let end = start + self.room();
        let (readable, writable) = self.data_left();
        let middle = start.saturating_add(readable).min(end);
        self.chunk = Chunk {
            run,
            readable: start..middle,
            writable: middle..middle.saturating_add(writable).min(end),
            ..Chunk::default()
        };
    }

    /// Brings the header, if it is not known, and the chunk's data.
    pub(super) fn plan_copies_in(&mut self, operations: &mut Vec<CopyOp>) {
        let first = operations.len();
        let from = Direction::FromGuest;
        let readable = &self.request.readable;
        if self.command.is_none() {
            readable.copies(from, 0, HEADER, self.header_slot(), operations);
        }
        let Range { start, end } = self.chunk.readable;
        readable.copies(from, HEADER + self.done, end - start, start, operations);
        self.chunk.copies = first..operations.len();
    }

    /// What is to be done with the chunk now that it is here.
    pub(super) fn execute(
        &mut self,
        memory: &VolatileSlice<'_>,
        disk: &Disk,
        serial: &Serial,
    ) -> Result<Next, Failure> {
        let command = match self.command {
            Some(command) => command,
            None => self.parse(memory, disk)?,
        };
        let command = match command {
            Command::Erase(erase) => self.parse_segment(erase, memory, disk)?,
            other => other,
        };
        let place = match command {
            Command::Read { .. } => self.chunk.writable.clone(),
            Command::Write { .. } => {
                self.chunk.writable.end = self.chunk.writable.start;
                self.chunk.readable.clone()
            }
            Command::Flush | Command::Erase(_) | Command::Erased { .. } => {
                self.chunk.writable.end = self.chunk.writable.start;
                0..0
            }
            Command::GetId => {
                let left = self.writable_data().min(SERIAL) - self.done;
                let range = &mut self.chunk.writable;
                range.end = range.start + range.len().min(left);
                let bytes = &serial[self.done..self.done + range.len()];
                memory
                    .write_slice(bytes, range.start)
                    .expect("the chunk is in the memory");
                self.chunk.moved = range.len();
                return Ok(self.end_chunk());
            }
        };
        let is_nothing = match command {
            Command::Flush => false,
            Command::Erased { bytes, .. } => bytes == 0,
            _ => place.is_empty(),
        };
        if is_nothing {
            return Ok(self.end_chunk());
        }
        Ok(Next::Disk(self.transfer(command, place)))
    }

    fn parse(&mut self, memory: &VolatileSlice<'_>, disk: &Disk) -> Result<Command, Failure> {
        if self.request.readable.len() < HEADER {
            return Err(Failure::Guest(Status::IoError));
        }
        let header = memory
            .read_obj(self.header_slot())
            .expect("every request has a header slot in the memory");
        let command = Command::parse(header, self.readable_data(), self.writable_data(), disk)
            .map_err(Failure::Guest)?;
        self.command = Some(command);
        Ok(command)
    }

    /// What a request that erases asks for, by the segment that is its data.
    fn parse_segment(
        &mut self,
        erase: Erase,
        memory: &VolatileSlice<'_>,
        disk: &Disk,
    ) -> Result<Command, Failure> {
        let segment = memory
            .read_obj(self.chunk.readable.start)
            .expect("the chunk is in the memory");
        let command = erase.parse(segment, disk).map_err(Failure::Guest)?;
        self.command = Some(command);
        Ok(command)
    }

    fn transfer(&self, command: Command, place: Range<usize>) -> Transfer {
        let (kind, offset) = match command {
            _ if self.chunk.flushing => (Kind::Flush, 0),
            Command::Read { offset } => (Kind::Read, offset),
            Command::Write { offset } => (Kind::Write, offset),
            Command::Erased {
                offset,
                bytes,
                may_go,
                ..
            } => (Kind::Erase { bytes, may_go }, offset),
            Command::Flush | Command::GetId | Command::Erase(_) => (Kind::Flush, 0),
        };
        Transfer {
            id: self.id,
            kind,
            offset: offset + (self.done + self.chunk.moved) as u64,
            place,
        }
    }

    /// Takes note of what the disk has moved. What it left over it is given again.
    pub(super) fn moved(&mut self, result: io::Result<usize>) -> Result<Next, Failure> {
        let (command, place) = match self.command {
            _ if self.chunk.flushing => {
                return result.map(|_| self.end_chunk()).map_err(Failure::Disk);
            }
            Some(command @ Command::Read { .. }) => (command, &self.chunk.writable),
            Some(command @ Command::Write { .. }) => (command, &self.chunk.readable),
            Some(command @ Command::Erased { .. }) => return self.erased(command, result),
            _ => return result.map(|_| self.end_chunk()).map_err(Failure::Disk),
        };
        self.chunk.moved += match result {
            Ok(0) => return Err(Failure::Disk(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(Failure::Disk(error)),
        };
        let rest = place.start + self.chunk.moved..place.end;
        if rest.is_empty() && self.write_through && matches!(command, Command::Write { .. }) {
            self.chunk.flushing = true;
            Ok(Next::Disk(self.transfer(command, 0..0)))
        } else if rest.is_empty() {
            Ok(self.end_chunk())
        } else {
            Ok(Next::Disk(self.transfer(command, rest)))
        }
    }

    fn erased(&mut self, command: Command, result: io::Result<usize>) -> Result<Next, Failure> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                Ok(Next::Disk(self.transfer(command, 0..0)))
            }
            // The driver has another way.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(Failure::Guest(Status::Unsupported))
            }
            Err(error) => Err(Failure::Disk(error)),
            Ok(_) if self.write_through => {
                self.chunk.flushing = true;
                Ok(Next::Disk(self.transfer(command, 0..0)))
            }
            Ok(_) => Ok(self.end_chunk()),
        }
    }

    /// The chunk's data is where it belongs. After the last chunk the request is done.
    fn end_chunk(&mut self) -> Next {
        let wanted = match self.command {
            Some(Command::Read { .. }) => self.writable_data(),
            Some(Command::Write { .. }) => self.readable_data(),
            Some(Command::GetId) => self.writable_data().min(SERIAL),
            Some(Command::Flush | Command::Erase(_) | Command::Erased { .. }) | None => 0,
        };
        if self.done + self.chunk.moved >= wanted {
            self.status = Some(Status::Ok);
        }
        Next::CopyOut
    }

    /// Ends the request with an error: nothing of its chunk reaches the driver.
    pub(super) fn fail(&mut self, status: Status) {
        self.chunk.writable = 0..0;
        self.status = Some(status);
    }

    /// Takes the chunk's data out, and the status if there is one.
    pub(super) fn plan_copies_out(
        &mut self,
        memory: &VolatileSlice<'_>,
        operations: &mut Vec<CopyOp>,
    ) {
        let first = operations.len();
        let Range { start, end } = self.chunk.writable;
        self.request.writable.copies(
            Direction::ToGuest,
            self.done,
            end - start,
            start,
            operations,
        );
        self.plan_status(memory, operations);
        self.chunk.copies = first..operations.len();
    }

    pub(super) fn plan_status(&self, memory: &VolatileSlice<'_>, operations: &mut Vec<CopyOp>) {
        let Some(status) = self.status else { return };
        let place = self.status_place();
        memory
            .write_obj(status.byte(), place)
            .expect("every request has a header slot in the memory");
        let last = self.writable_data();
        self.request
            .writable
            .copies(Direction::ToGuest, last, 1, place, operations);
    }

    /// Counts the chunk's work, which has reached the driver.
    pub(super) fn advance(&mut self, counters: &mut Counters) {
        let failed = !matches!(self.status, None | Some(Status::Ok));
        if !failed {
            let (read, written) = match self.command {
                Some(Command::Read { .. } | Command::GetId) => (self.chunk.writable.len(), 0),
                Some(Command::Write { .. }) => (0, self.chunk.readable.len()),
                Some(Command::Flush | Command::Erase(_) | Command::Erased { .. }) | None => (0, 0),
            };
            self.done += read + written;
            counters.read_bytes += read as u64;
            counters.written_bytes += written as u64;
        }
        if self.is_finished() {
            counters.requests += 1;
            counters.errors += u64::from(failed);
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.status.is_some()
    }

    pub(super) fn into_completion(self) -> Completion {
        // virtio 1.3, 2.7.8.2: no more than what was written from the first byte on without a gap. The status
        // is the last byte, whatever lies before it.
        let data = match self.command {
            Some(Command::Read { .. } | Command::GetId) => self.done,
            Some(
                Command::Write { .. } | Command::Flush | Command::Erase(_) | Command::Erased { .. },
            )
            | None => 0,
        };
        let status = usize::from(data == self.writable_data());
        self.request.finish(data + status)
    }

    /// What whoever looks on is told of it.
    pub(super) fn detail(&self) -> RequestDetail {
        let (what, offset, bytes) = match self.command {
            Some(Command::Read { offset }) => ("read", offset, self.writable_data() as u64),
            Some(Command::Write { offset }) => ("write", offset, self.readable_data() as u64),
            Some(Command::Flush) => ("flush", 0, 0),
            Some(Command::GetId) => ("get-id", 0, 0),
            Some(Command::Erase(erase)) => (erase.name(), 0, 0),
            Some(Command::Erased {
                erase,
                offset,
                bytes,
                ..
            }) => (erase.name(), offset, bytes),
            None => ("refused", 0, 0),
        };
        RequestDetail {
            what,
            offset,
            bytes,
            has_failed: self.status != Some(Status::Ok),
        }
    }
}
