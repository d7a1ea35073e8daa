//! Where log lines go: standard error, or systemd's journal where that is the same. Neither can end a process nor hold it up,
//! whatever becomes of it.
//!
//! What an event has in the fields `guest`, `domid` and `device` stands before its message, and in the journal also in fields of
//! its own.

mod journal;

use journal::Journal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::{SendFlags, send};
use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

/// What a pipe that has room takes as a whole (`PIPE_BUF`, pipe(7)). The rest of a longer line is left out.
const MAX_LINE: usize = 4096;

/// Names the level in the environment.
pub const LEVEL_VARIABLE: &str = "XEN_VIRTIOD_LOG";

/// Has everything logged, from the level on that the environment names; `info` if it names none. False if what it
/// names is no level.
pub fn start() -> bool {
    let level = level();
    let output = Output::new(io::stderr().as_fd());
    let filter = level.unwrap_or(LevelFilter::INFO);
    let subscriber = Registry::default().with(output.with_filter(filter));
    // Another one is there already where a test has started it.
    let _ = tracing::subscriber::set_global_default(subscriber);
    level.is_some()
}

/// The level that the environment names.
pub fn level() -> Option<LevelFilter> {
    match std::env::var(LEVEL_VARIABLE) {
        Ok(name) => name.parse().ok(),
        Err(_) => Some(LevelFilter::INFO),
    }
}

/// What an event says. journald has its own clock, and so has a terminal's reader.
#[derive(Debug, Default, PartialEq, Eq)]
struct Record {
    guest: Option<String>,
    domid: Option<u64>,
    device: Option<String>,
    message: String,
}

impl Record {
    /// As a line, without its level.
    fn text(&self) -> String {
        let guest = match (&self.guest, self.domid) {
            (Some(name), Some(domid)) => format!("guest {name} ({domid}): "),
            (Some(name), None) => format!("guest {name}: "),
            (None, Some(domid)) => format!("guest {domid}: "),
            (None, None) => String::new(),
        };
        let device = self.device.as_ref().map(|device| format!("{device}: "));
        guest + &device.unwrap_or_default() + &self.message
    }
}

impl Visit for Record {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "domid" => self.domid = Some(value),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}{}", self.message),
            "guest" => self.guest = Some(format!("{value:?}")),
            "device" => self.device = Some(format!("{value:?}")),
            // Of a library's events.
            other => {
                let _ = write!(self.message, " {other}={value:?}");
            }
        }
    }
}

impl<S: Subscriber> Layer<S> for Output {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut record = Record::default();
        event.record(&mut record);
        self.log(*event.metadata().level(), &record);
    }
}

/// A descriptor that lines are written to as long as it takes them at once.
#[derive(Debug)]
pub struct Output {
    /// `None` if there is nothing to write to.
    file: Option<OwnedFd>,
    is_socket: bool,
    /// Where the descriptor is a stream to it.
    journal: Option<Journal>,
    /// Lines that were not taken, since the last that was.
    lost: AtomicU64,
}

impl Output {
    /// An output to what is open as `fd`, whose own flags stay as they are: others write through it too.
    pub fn new(fd: BorrowedFd<'_>) -> Self {
        let kind = fstat(fd).map(|status| FileType::from_raw_mode(status.st_mode));
        let reopens = matches!(kind, Ok(FileType::Fifo | FileType::CharacterDevice));
        let reopened = reopens.then(|| reopen(fd)).and_then(Result::ok);
        Self {
            file: reopened.or_else(|| fd.try_clone_to_owned().ok()),
            is_socket: matches!(kind, Ok(FileType::Socket)),
            journal: Journal::behind(fd),
            lost: AtomicU64::new(0),
        }
    }

    fn log(&self, level: Level, record: &Record) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let message = format!("{lost} lines could not be logged");
            let told = self.take(
                Level::WARN,
                &Record {
                    message,
                    ..Record::default()
                },
            );
            if !told {
                self.lost.fetch_add(lost, Ordering::Relaxed);
            }
        }
        if !self.take(level, record) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// True if it was taken.
    fn take(&self, level: Level, record: &Record) -> bool {
        // What the journal's socket does not take, its stream may.
        let is_sent = |journal: &Journal| journal.send(level, record);
        self.journal.as_ref().is_some_and(is_sent)
            || self.write_now(format!("{level:>5} {}\n", record.text()).as_bytes())
    }

    /// True if the line was taken.
    fn write_now(&self, line: &[u8]) -> bool {
        let Some(file) = &self.file else { return false };
        let mut cut;
        let mut line = line;
        if line.len() > MAX_LINE {
            cut = line[..MAX_LINE].to_vec();
            cut[MAX_LINE - 1] = b'\n';
            line = &cut;
        }
        if self.is_socket {
            return send(file, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok();
        }
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(file, PollFlags::OUT)];
        // A pipe that could not be opened anew has room for a line when it is writable.
        let writable = poll(&mut fds, Some(&now)).is_ok() && fds[0].revents() == PollFlags::OUT;
        writable && rustix::io::write(file, line).is_ok()
    }
}

/// What is open as `fd`, opened once more so that writing to it never waits.
fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = fcntl_getfl(fd)? & OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn said(message: &str) -> Record {
        let message = message.to_owned();
        Record {
            message,
            ..Record::default()
        }
    }

    #[test]
    fn a_line_says_whose_it_is() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::new(writer.as_fd());
        let (domid, device) = (7_u16, "virtio/0");
        tracing::subscriber::with_default(Registry::default().with(output), || {
            tracing::warn!(guest = "g", domid, device = %device, "is {}", "slow");
            tracing::error!(domid, "no worker");
            tracing::info!(guest = "g", "begins");
            tracing::info!(more = 1, "done");
        });
        drop(writer);
        let mut lines = String::new();
        reader.read_to_string(&mut lines).unwrap();
        assert_eq!(
            lines,
            " WARN guest g (7): virtio/0: is slow\nERROR guest 7: no worker\n INFO guest g: begins\n INFO done more=1\n"
        );
    }

    #[test]
    fn lines_arrive_and_those_that_did_not_are_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::new(writer.as_fd());
        // More than a pipe holds: this would wait for ever.
        for _ in 0..200 {
            output.log(Level::INFO, &said(&"x".repeat(993)));
        }
        let lost = output.lost.load(Ordering::Relaxed);
        assert!(lost > 100, "{lost}");
        let mut taken = vec![0; (200 - usize::try_from(lost).unwrap()) * 1000];
        reader.read_exact(&mut taken).unwrap();
        output.log(Level::INFO, &said("at last"));
        drop((output, writer));
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            format!(" WARN {lost} lines could not be logged\n INFO at last\n")
        );
    }

    #[test]
    fn without_the_journals_socket_its_stream_has_the_line() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(writer.as_fd());
        drop(writer);
        let folder = tempfile::tempdir().unwrap();
        output.journal = Some(Journal::at(&folder.path().join("nobody")).unwrap());
        output.log(Level::ERROR, &said("where to"));
        drop(output);
        let mut line = String::new();
        reader.read_to_string(&mut line).unwrap();
        assert_eq!(line, "ERROR where to\n");
    }

    #[test]
    fn an_output_that_is_full_or_gone_is_no_error() {
        let (reader, dead) = io::pipe().unwrap();
        drop(reader);
        let (journal, other) = UnixStream::pair().unwrap();
        drop(other);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let read_only = File::open("/proc/self/status").unwrap();
        for fd in [
            dead.as_fd(),
            journal.as_fd(),
            full.as_fd(),
            read_only.as_fd(),
        ] {
            let output = Output::new(fd);
            output.log(Level::INFO, &said("line"));
            assert_eq!(output.lost.load(Ordering::Relaxed), 1, "{output:?}");
        }
    }

    #[test]
    fn a_journal_that_does_not_read_holds_nobody_up() {
        let (journal, mut reader) = UnixStream::pair().unwrap();
        let output = Output::new(journal.as_fd());
        for _ in 0..10_000 {
            output.log(Level::INFO, &said(&"x".repeat(1000)));
        }
        assert!(output.lost.load(Ordering::Relaxed) > 0);
        let mut first = [0; 1000];
        reader.read_exact(&mut first).unwrap();
    }

    #[test]
    fn a_file_is_gone_on_with_where_it_ends() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut first = file.reopen().unwrap();
        first.write_all(b"before\n").unwrap();
        let output = Output::new(first.as_fd());
        output.log(Level::INFO, &said("after"));
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text, "before\n INFO after\n");
    }
}
