//! The log of a port: a file, and the one before it.
//!
//! A thread for each writes what its worker puts into a pipe: a disk that hangs holds up the log, and neither the guest nor the
//! service.

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use xen_virtio_backend::LogLimit;

/// The KiB from which on another file is begun, if nothing else is said.
pub(super) const DEFAULT_KIB: u32 = 1024;

/// Bytes on their way to the thread.
const PIPE: usize = 4096;

/// Bytes a second: a guest that writes without end must not wear dom0's disk out, nor take its processor.
const RATE: usize = 1 << 20;
const PERIOD: Duration = Duration::from_millis(250);
/// What is written at once counts for so many at least.
const LEAST: usize = 128;

/// How long opening a log may take; a disk that hangs has it opened later.
const OPENING: Duration = Duration::from_secs(2);
/// … and the wait before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long its worker may take to say the last of a log that is given up.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// What keeps a log until this is dropped, and a moment longer.
#[derive(Debug)]
pub(super) struct LogKeeper {
    writer: OwnedFd,
    /// Closed with this.
    _keeps: OwnedFd,
}

impl LogKeeper {
    /// Keeps a log at `path`, of `kib` KiB at most; what is older is beside it, at [`older`].
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn new(path: &Path, kib: u32) -> Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&writer, PIPE)?;
        fcntl_setfl(&writer, OFlags::NONBLOCK)?;
        let (is_kept, keeps) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut log = Log {
            path: path.to_owned(),
            limit: u64::from(kib) << 10,
            file: None,
            log_limit: LogLimit::default(),
        };
        let (opened, is_opened) = sync_channel(1);
        let thread = thread::Builder::new().name("console log".to_owned());
        thread.spawn(move || {
            let result = log.open().map(drop);
            let failed = result.is_err();
            // Who has waited too long hears of it by the log.
            let is_awaited = opened.send(result).is_ok();
            if !(failed && is_awaited) {
                log.keep(&File::from(reader), &is_kept);
            }
        })?;
        match is_opened.recv_timeout(OPENING) {
            Ok(result) => {
                result.with_context(|| format!("opening the log {}", path.display()))?;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                tracing::warn!(
                    "opening the log {} takes long; the guest goes on meanwhile",
                    path.display()
                );
            }
        }
        Ok(Self {
            writer,
            _keeps: keeps,
        })
    }

    /// For a worker.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.writer.try_clone()
    }
}

/// Where the older part of a log is.
pub(super) fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

struct Log {
    path: PathBuf,
    /// Bytes of a file.
    limit: u64,
    /// None, before it is opened, and after it could not be written.
    file: Option<File>,
    log_limit: LogLimit,
}

impl Log {
    /// Writes what is read, until nobody is left who writes it, or some time after `is_kept` has said the last.
    fn keep(mut self, mut from: &File, is_kept: &OwnedFd) {
        let mut bytes = [0; PIPE];
        let most = usize::try_from(self.limit).map_or(PIPE, |limit| PIPE.min(limit));
        let mut allowance = Allowance::new();
        let mut end = None;
        while wait(from, is_kept, &mut end) {
            let len = match from.read(&mut bytes[..most]) {
                Ok(0) => return,
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!("the log {} ends: {error}", self.path.display());
                    return;
                }
            };
            let mut rest = &bytes[..len];
            while let Err(error) = self.write(&mut rest) {
                // It is opened anew for the rest, which waits, as all that comes after does.
                self.file = None;
                if self.log_limit.allow() {
                    tracing::error!(
                        "writing {}: {error}; it is tried again",
                        self.path.display()
                    );
                }
                if is_over(is_kept) {
                    return;
                }
                thread::sleep(RETRY);
            }
            allowance.spend(len.max(LEAST));
        }
    }

    /// Writes `bytes`, of which the rest is left if that fails.
    fn write(&mut self, bytes: &mut &[u8]) -> io::Result<()> {
        // Others may have made it shorter, or have taken it away.
        if self.open()?.metadata()?.nlink() == 0 {
            self.file = None;
        }
        let len = self.open()?.metadata()?.len();
        if len > 0 && len + bytes.len() as u64 > self.limit {
            match fs::rename(&self.path, older(&self.path)) {
                Ok(()) => self.file = None,
                // Whatever is in its way: no more room than it may have.
                Err(_) => self.open()?.set_len(0)?,
            }
        }
        while !bytes.is_empty() {
            match self.open()?.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => *bytes = &bytes[len..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<&mut File> {
        if let Some(ref mut file) = self.file {
            return Ok(file);
        }
        // What a guest says is for root. Of whoever owns the folder, no link is followed.
        let opened = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&self.path)?;
        if !opened.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(self.file.insert(opened))
    }
}

/// Waits until there is something to read, or nobody is left who writes. False at the `end`, which is set once nobody keeps the log
/// any more.
fn wait(from: &File, is_kept: &OwnedFd, end: &mut Option<Instant>) -> bool {
    loop {
        let limit = end.map(|end| end.saturating_duration_since(Instant::now()));
        if limit == Some(Duration::ZERO) {
            return false;
        }
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds = [
            PollFd::new(from, PollFlags::IN),
            PollFd::new(is_kept, PollFlags::IN),
        ];
        // What is over is over: it tells of that again and again.
        let count = if end.is_some() { 1 } else { 2 };
        match poll(&mut fds[..count], limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return false,
        }
        if count == 2 && !fds[1].revents().is_empty() {
            *end = Some(Instant::now() + LAST_WORDS);
        }
        if !fds[0].revents().is_empty() {
            return true;
        }
    }
}

/// Whether nobody keeps the log any more.
fn is_over(is_kept: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(is_kept, PollFlags::IN)];
    let now = Timespec::default();
    poll(&mut fds, Some(&now)).is_err() || !fds[0].revents().is_empty()
}

/// What may be written, period by period.
struct Allowance {
    began: Instant,
    used: usize,
}

impl Allowance {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            used: 0,
        }
    }

    /// So much was written. Waits for the next period if that was all of this one.
    fn spend(&mut self, bytes: usize) {
        if self.began.elapsed() >= PERIOD {
            *self = Self::new();
        }
        self.used += bytes;
        if self.used as u128 * 1000 >= RATE as u128 * PERIOD.as_millis() {
            thread::sleep(PERIOD.saturating_sub(self.began.elapsed()));
            *self = Self::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
        let limit = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < limit, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_log_takes_no_more_room_than_it_may_and_has_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before\n").unwrap();
        let keeper = LogKeeper::new(&path, 1).unwrap();
        let writer = File::from(keeper.descriptor().unwrap());
        let older = older(&path);
        for line in 0..300 {
            let line = format!("line {line:04}\n");
            wait_for("the pipe takes a line", || {
                (&writer).write_all(line.as_bytes()).is_ok()
            });
            wait_for("it is written", || {
                fs::read_to_string(&path).is_ok_and(|log| log.ends_with(&line))
            });
            assert!(fs::metadata(&path).unwrap().len() <= 1024);
        }
        let both = fs::read_to_string(&older).unwrap() + &fs::read_to_string(&path).unwrap();
        assert!(both.len() > 1024 && both.ends_with("line 0298\nline 0299\n"));
        let lines: Vec<_> = both.lines().collect();
        let first: usize = lines[0][5..].parse().unwrap();
        assert_eq!(lines.len(), 300 - first);
        fs::remove_file(&path).unwrap();
        (&writer).write_all(b"more\n").unwrap();
        wait_for("it is made anew", || {
            fs::read_to_string(&path).is_ok_and(|log| log == "more\n")
        });
    }

    #[test]
    fn what_cannot_be_written_is_written_when_it_can() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("there").join("log");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let keeper = LogKeeper::new(&path, 1).unwrap();
        let mut writer = File::from(keeper.descriptor().unwrap());
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        writer.write_all(b"first\n").unwrap();
        thread::sleep(Duration::from_millis(50));
        writer.write_all(b"second\n").unwrap();
        fs::create_dir(path.parent().unwrap()).unwrap();
        wait_for("it is written", || {
            fs::read_to_string(&path).is_ok_and(|log| log == "first\nsecond\n")
        });
        // What is in the way of the older part does not make it longer than it may be.
        fs::create_dir(older(&path)).unwrap();
        for _ in 0..100 {
            wait_for("the pipe takes a line", || {
                writer.write_all(&[b'x'; 64]).is_ok()
            });
        }
        wait_for("all is written", || {
            rustix::io::ioctl_fionread(&writer).is_ok_and(|unread| unread == 0)
        });
        assert!(fs::metadata(&path).unwrap().len() <= 1024);
    }

    #[test]
    fn a_log_takes_a_megabyte_a_second() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let keeper = LogKeeper::new(&path, 1 << 20).unwrap();
        let mut writer = File::from(keeper.descriptor().unwrap());
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            let _ = writer.write(&[0; 1024]);
        }
        let len = usize::try_from(fs::metadata(&path).unwrap().len()).unwrap();
        assert!((RATE / 2..=RATE * 3 / 2).contains(&len), "{len}");
    }

    /// A worker that its guest has taken over may keep the pipe.
    #[test]
    fn a_log_that_nobody_keeps_ends_whoever_writes() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = LogKeeper::new(&folder.path().join("log"), 1).unwrap();
        let mut writer = File::from(keeper.descriptor().unwrap());
        drop(keeper);
        let began = Instant::now();
        wait_for("the thread to end", || {
            let ended = writer.write(b"more\n");
            ended.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        });
        assert!(began.elapsed() >= LAST_WORDS - Duration::from_millis(100));
    }

    #[test]
    fn a_log_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        for path in [&link, Path::new("/dev/null"), folder.path()] {
            assert!(LogKeeper::new(path, 1).is_err(), "{}", path.display());
        }
    }
}
