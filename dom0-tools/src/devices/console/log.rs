//! The log of a port: a file, and the one before it.
//!
//! A thread for each writes what its worker puts into a pipe: a disk that hangs holds up the log, and neither the guest nor the
//! service.

use anyhow::{Context, Result};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use xen_virtio_backend::LogLimit;

/// The KiB from which on another file is begun, if nothing else is said.
pub(super) const DEFAULT_KIB: u32 = 1024;

/// Bytes on their way to the thread.
const PIPE: usize = 4096;

/// What keeps a log, as long as anyone has the descriptor.
#[derive(Debug)]
pub(super) struct LogKeeper(OwnedFd);

impl LogKeeper {
    /// Keeps a log at `path`, of `kib` KiB at most; what is older is beside it, under the same name with `.1` behind.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn new(path: &Path, kib: u32) -> Result<Self> {
        let mut log = Log {
            path: path.to_owned(),
            limit: u64::from(kib) << 10,
            file: None,
            log_limit: LogLimit::default(),
        };
        log.open()
            .with_context(|| format!("opening the log {}", path.display()))?;
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&writer, PIPE)?;
        fcntl_setfl(&writer, OFlags::NONBLOCK)?;
        let thread = thread::Builder::new().name("console log".to_owned());
        thread.spawn(move || log.keep(File::from(reader)))?;
        Ok(Self(writer))
    }

    /// For a worker.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

struct Log {
    path: PathBuf,
    /// Bytes of a file.
    limit: u64,
    /// None, after it could not be written.
    file: Option<File>,
    log_limit: LogLimit,
}

impl Log {
    /// Writes what is read, until nobody is left who writes it.
    fn keep(mut self, mut from: File) {
        let mut bytes = [0; PIPE];
        loop {
            match from.read(&mut bytes) {
                Ok(0) => return,
                Ok(len) => {
                    if let Err(error) = self.write(&bytes[..len]) {
                        // It is opened anew for what comes next.
                        self.file = None;
                        if self.log_limit.allow() {
                            tracing::error!("writing {}: {error}", self.path.display());
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!("the log {} ends: {error}", self.path.display());
                    return;
                }
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Others may have made it shorter, or have taken it away.
        let there = self.open()?.metadata()?;
        if there.nlink() == 0 {
            self.file = None;
        }
        let len = self.open()?.metadata()?.len();
        if len > 0 && len + bytes.len() as u64 > self.limit {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
            self.file = None;
        }
        self.open()?.write_all(bytes)
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
        drop(keeper);
        let older = folder.path().join("log.1");
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
    fn a_log_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        for path in [&link, Path::new("/dev/null"), folder.path()] {
            assert!(LogKeeper::new(path, 1).is_err(), "{}", path.display());
        }
    }
}
