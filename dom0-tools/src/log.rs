//! Where log lines go: standard error, which can neither end a process nor hold it up, whatever becomes of it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::{SendFlags, send};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing_subscriber::filter::LevelFilter;

/// What a pipe that has room takes as a whole (`PIPE_BUF`, pipe(7)). The rest of a longer line is left out.
const MAX_LINE: usize = 4096;

/// Names the level in the environment.
pub const LEVEL_VARIABLE: &str = "XEN_VIRTIOD_LOG";

/// Has everything logged, from the level on that the environment names; `info` if it names none. False if what it
/// names is no level.
pub fn start() -> bool {
    let level = level();
    let output = Arc::new(Output::new(io::stderr().as_fd()));
    // journald has its own clock, and so has a terminal's reader.
    tracing_subscriber::fmt()
        .with_max_level(level.unwrap_or(LevelFilter::INFO))
        .with_writer(output)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .log_internal_errors(false)
        .init();
    level.is_some()
}

/// The level that the environment names.
pub fn level() -> Option<LevelFilter> {
    match std::env::var(LEVEL_VARIABLE) {
        Ok(name) => name.parse().ok(),
        Err(_) => Some(LevelFilter::INFO),
    }
}

/// A descriptor that lines are written to as long as it takes them at once.
#[derive(Debug)]
pub struct Output {
    /// `None` if there is nothing to write to.
    file: Option<OwnedFd>,
    is_socket: bool,
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
            lost: AtomicU64::new(0),
        }
    }

    fn line(&self, line: &[u8]) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0
            && !self.write_now(format!(" WARN {lost} lines could not be logged\n").as_bytes())
        {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        if !self.write_now(line) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
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

/// Whatever is written counts as written.
impl Write for &Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn lines_arrive_and_those_that_did_not_are_counted() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::new(writer.as_fd());
        let line = [b'x'; 1000];
        // More than a pipe holds: this would wait for ever.
        for _ in 0..200 {
            (&output).write_all(&line).unwrap();
        }
        let lost = output.lost.load(Ordering::Relaxed);
        assert!(lost > 100, "{lost}");
        let mut taken = vec![0; (200 - usize::try_from(lost).unwrap()) * line.len()];
        reader.read_exact(&mut taken).unwrap();
        (&output).write_all(b"at last\n").unwrap();
        drop((output, writer));
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            format!(" WARN {lost} lines could not be logged\nat last\n")
        );
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
            (&output).write_all(b"line\n").unwrap();
            assert_eq!(output.lost.load(Ordering::Relaxed), 1, "{output:?}");
        }
    }

    #[test]
    fn a_journal_that_does_not_read_holds_nobody_up() {
        let (journal, mut reader) = UnixStream::pair().unwrap();
        let output = Output::new(journal.as_fd());
        for _ in 0..10_000 {
            (&output).write_all(&[b'x'; 1000]).unwrap();
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
        (&output).write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"before\nafter\n");
    }
}
