//! Requests on their way through a round: copied in together, carried out, copied out together.

use super::Serial;
use super::disk::Disk;
use super::header::{Command, HEADER, Status};
use crate::device::{DeviceCounters, DeviceError};
use crate::log_limit::LogLimit;
use crate::request::{Completion, Request};
use std::io;
use std::ops::Range;
use xen_virtio_guest_mapping::{CopyFault, CopyOp, Direction, GuestAccess};

/// Bytes that the requests of a round have together: all that a guest's requests can make us hold.
/// A larger request takes several rounds.
pub(super) const BUFFER: usize = 1 << 20;

/// Bytes of what `VIRTIO_BLK_T_GET_ID` returns.
const SERIAL: usize = size_of::<Serial>();

/// A request, and how far it has got.
pub(super) struct Job {
    request: Request,
    /// Known once the header has been copied and parsed.
    command: Option<Command>,
    /// Bytes of data done in earlier rounds.
    done: usize,
    status: Option<Status>,
    window: Window,
}

/// The parts of the round's buffer that a job has in this round.
#[derive(Default)]
struct Window {
    header: Range<usize>,
    /// Data from the driver.
    readable: Range<usize>,
    /// Data for the driver; what of it is to be copied out.
    writable: Range<usize>,
    status: usize,
    /// The copy operations that bring the header and the readable data, then those that take out the
    /// writable data and the status.
    copies_in: Range<usize>,
    copies_out: Range<usize>,
}

impl Job {
    /// # Errors
    ///
    /// [`DeviceError::NoStatus`] for a request that could not even be told that it failed.
    pub(super) fn new(request: Request) -> Result<Self, DeviceError> {
        if request.writable.is_empty() {
            return Err(DeviceError::NoStatus);
        }
        Ok(Self {
            request,
            command: None,
            done: 0,
            status: None,
            window: Window::default(),
        })
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
            Some(Command::Write { .. }) => (readable, 0),
            Some(Command::GetId) => (0, writable.min(SERIAL.saturating_sub(self.done))),
            Some(Command::Flush) => (0, 0),
        }
    }

    /// Bytes that the rest of the job would like of a round's buffer.
    pub(super) fn room(&self) -> usize {
        let (readable, writable) = self.data_left();
        readable + writable + HEADER + 1
    }

    pub(super) fn is_finished(&self) -> bool {
        self.status.is_some()
    }

    pub(super) fn into_completion(self) -> Completion {
        let data = match (self.command, self.status) {
            (Some(Command::Read { .. } | Command::GetId), Some(Status::Ok)) => self.done,
            _ => 0,
        };
        self.request.finish(data + 1)
    }

    /// Takes this job's part of the round's buffer, from `start`; returns where the next may start.
    fn take_window(&mut self, start: usize) -> usize {
        let (readable, writable) = self.data_left();
        let header = start..start + HEADER;
        let status = header.end;
        let data = status + 1;
        // Data stops at BUFFER, which a header that begins just below it reaches past.
        let limit = BUFFER.max(data);
        let readable = data..(data + readable).min(limit);
        let writable = readable.end..(readable.end + writable).min(limit);
        let end = writable.end;
        self.window = Window {
            header,
            readable,
            writable,
            status,
            ..Window::default()
        };
        end
    }

    fn plan_copies_in(&mut self, operations: &mut Vec<CopyOp>) {
        let first = operations.len();
        let readable = &self.request.readable;
        if self.command.is_none() {
            readable.copies(
                Direction::FromGuest,
                0,
                HEADER,
                self.window.header.start,
                operations,
            );
        }
        let Range { start, end } = self.window.readable;
        readable.copies(
            Direction::FromGuest,
            HEADER + self.done,
            end - start,
            start,
            operations,
        );
        self.window.copies_in = first..operations.len();
    }

    /// Carries out what this round's window allows. A status ends the job.
    fn execute(
        &mut self,
        buffer: &mut [u8],
        disk: &Disk,
        serial: &Serial,
    ) -> Result<Option<Status>, Failure> {
        let command = match self.command {
            Some(command) => command,
            None => self.parse(buffer, disk)?,
        };
        match command {
            Command::Read { offset } => {
                let range = self.window.writable.clone();
                disk.read(offset + self.done as u64, &mut buffer[range.clone()])?;
                Ok((self.done + range.len() == self.writable_data()).then_some(Status::Ok))
            }
            Command::Write { offset } => {
                let range = self.window.readable.clone();
                disk.write(offset + self.done as u64, &buffer[range.clone()])?;
                self.window.writable.end = self.window.writable.start;
                Ok((self.done + range.len() == self.readable_data()).then_some(Status::Ok))
            }
            Command::Flush => {
                disk.flush()?;
                self.window.writable.end = self.window.writable.start;
                Ok(Some(Status::Ok))
            }
            Command::GetId => {
                let wanted = self.writable_data().min(SERIAL);
                let range = &mut self.window.writable;
                range.end = range.start + range.len().min(wanted - self.done);
                buffer[range.clone()].copy_from_slice(&serial[self.done..self.done + range.len()]);
                Ok((self.done + range.len() == wanted).then_some(Status::Ok))
            }
        }
    }

    fn parse(&mut self, buffer: &[u8], disk: &Disk) -> Result<Command, Failure> {
        if self.request.readable.len() < HEADER {
            return Err(Failure::Guest(Status::IoError));
        }
        let header = buffer[self.window.header.clone()]
            .try_into()
            .expect("HEADER bytes");
        let command = Command::parse(header, self.readable_data(), self.writable_data(), disk)
            .map_err(Failure::Guest)?;
        self.command = Some(command);
        Ok(command)
    }

    fn plan_copies_out(&mut self, buffer: &mut [u8], operations: &mut Vec<CopyOp>) {
        let first = operations.len();
        let writable = &self.request.writable;
        let Range { start, end } = self.window.writable;
        writable.copies(
            Direction::ToGuest,
            self.done,
            end - start,
            start,
            operations,
        );
        if let Some(status) = self.status {
            self.plan_status(status, buffer, operations);
        }
        self.window.copies_out = first..operations.len();
    }

    fn plan_status(&self, status: Status, buffer: &mut [u8], operations: &mut Vec<CopyOp>) {
        buffer[self.window.status] = status.byte();
        let place = self.writable_data();
        self.request
            .writable
            .copies(Direction::ToGuest, place, 1, self.window.status, operations);
    }
}

/// Why a request ends with an error status.
enum Failure {
    /// The guest asked for what cannot be.
    Guest(Status),
    /// The disk failed.
    Disk(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// The buffer of a round, and its scratch space.
pub(super) struct Round {
    buffer: Vec<u8>,
    operations: Vec<CopyOp>,
    log_limit: LogLimit,
}

impl Round {
    pub(super) fn new() -> Self {
        // One status byte and header more than BUFFER: the window of a job that starts at its very end.
        Self {
            buffer: vec![0; BUFFER + HEADER + 1],
            operations: Vec::new(),
            log_limit: LogLimit::default(),
        }
    }

    /// Takes every job as far as the buffer allows, in two batches of copies.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Status`] if a job cannot be told how it ended.
    pub(super) fn run(
        &mut self,
        jobs: &mut [Job],
        disk: &Disk,
        serial: &Serial,
        access: &mut dyn GuestAccess,
        driver_flushes: bool,
        counters: &mut DeviceCounters,
    ) -> Result<(), DeviceError> {
        let jobs = self.windows(jobs);
        self.operations.clear();
        for job in &mut *jobs {
            job.plan_copies_in(&mut self.operations);
        }
        access.copy(&mut self.buffer, &mut self.operations);

        let mut wrote = false;
        for job in &mut *jobs {
            let fault = first_fault(&self.operations[job.window.copies_in.clone()]);
            let executed = match fault {
                Some(fault) => {
                    self.log("a request's data cannot be read from the guest", &fault);
                    Err(Failure::Guest(Status::IoError))
                }
                None => job.execute(&mut self.buffer, disk, serial),
            };
            job.status = match executed {
                Ok(status) => status,
                Err(failure) => {
                    job.window.writable = 0..0;
                    Some(self.status_of(failure))
                }
            };
            wrote |= matches!(job.command, Some(Command::Write { .. }));
        }
        if wrote
            && !driver_flushes
            && let Err(error) = disk.flush()
        {
            let status = self.status_of(Failure::Disk(error));
            for job in jobs
                .iter_mut()
                .filter(|job| matches!(job.command, Some(Command::Write { .. })))
            {
                job.status = Some(status);
            }
        }
        self.copy_out(jobs, access)?;
        for job in jobs {
            job.advance(counters);
        }
        Ok(())
    }

    /// Gives each job its window; returns the jobs that got one.
    fn windows<'a>(&self, jobs: &'a mut [Job]) -> &'a mut [Job] {
        let mut start = 0;
        let mut count = 0;
        for job in &mut *jobs {
            if start >= BUFFER {
                break;
            }
            start = job.take_window(start);
            count += 1;
        }
        &mut jobs[..count]
    }

    fn copy_out(
        &mut self,
        jobs: &mut [Job],
        access: &mut dyn GuestAccess,
    ) -> Result<(), DeviceError> {
        self.operations.clear();
        for job in &mut *jobs {
            job.plan_copies_out(&mut self.buffer, &mut self.operations);
        }
        access.copy(&mut self.buffer, &mut self.operations);
        // A request whose data could not be delivered failed, and is told so in a batch of its own.
        let mut again = Vec::new();
        for job in &mut *jobs {
            let Some(fault) = first_fault(&self.operations[job.window.copies_out.clone()]) else {
                continue;
            };
            self.log("a request's result cannot be written to the guest", &fault);
            job.status = Some(Status::IoError);
            job.plan_status(Status::IoError, &mut self.buffer, &mut again);
        }
        access.copy(&mut self.buffer, &mut again);
        first_fault(&again).map_or(Ok(()), |fault| Err(DeviceError::Status(fault)))
    }

    fn status_of(&mut self, failure: Failure) -> Status {
        match failure {
            Failure::Guest(status) => status,
            Failure::Disk(error) => {
                self.log("the disk failed", &error);
                Status::IoError
            }
        }
    }

    fn log(&mut self, what: &str, error: &dyn std::error::Error) {
        if self.log_limit.allow() {
            tracing::warn!("{what}: {error}; the guest is told of an I/O error");
        }
    }
}

impl Job {
    /// Counts this round's work.
    fn advance(&mut self, counters: &mut DeviceCounters) {
        let failed = !matches!(self.status, None | Some(Status::Ok));
        if !failed {
            let (read, written) = match self.command {
                Some(Command::Read { .. } | Command::GetId) => (self.window.writable.len(), 0),
                Some(Command::Write { .. }) => (0, self.window.readable.len()),
                Some(Command::Flush) | None => (0, 0),
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
}

fn first_fault(operations: &[CopyOp]) -> Option<CopyFault> {
    operations
        .iter()
        .find_map(|operation| operation.result.err())
}
