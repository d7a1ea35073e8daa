//! Looks on at the requests of a device.

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write, stdout};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::ctl::control::{self, ControlError};
use xen_virtio_dom0_tools::ctl::trace::{Filter, HEADING, TraceLine};

/// Bytes that may wait to be read: some thousand requests.
const PIPE_SIZE: usize = 1 << 20;
/// The longest line is much shorter.
const MAX_LINE: u64 = 4096;

/// How long another worker, or another service, may take.
const RECONNECT_LIMIT: Duration = Duration::from_secs(30);
const RECONNECT_WAIT: Duration = Duration::from_millis(100);

/// What is looked at.
pub(crate) struct Wanted {
    pub(crate) guest: String,
    pub(crate) device: String,
    pub(crate) filter: Filter,
    /// How many requests are shown, if that has an end.
    pub(crate) count: Option<u64>,
    pub(crate) json: bool,
}

/// Why nothing more comes by a connection.
enum End {
    /// As much was shown as was asked for, or nobody reads it any more.
    Shown,
    /// The worker is gone, and there may be another one.
    Lost,
}

/// Shows the requests of a device until as many were shown as are wanted.
///
/// # Errors
///
/// What keeps it from going on.
pub(crate) fn run(wanted: &Wanted) -> Result<()> {
    let mut tracer = Tracer {
        wanted,
        began: Instant::now(),
        connected: Duration::ZERO,
        shown: 0,
    };
    let (mut lines, device) = tracer.connect()?;
    crate::say(&format!("{device}; Ctrl-C ends\n"));
    if !wanted.json {
        crate::say(HEADING);
    }
    loop {
        match tracer.show(&mut lines)? {
            End::Shown => return Ok(()),
            End::Lost => {
                crate::say("-- its worker is gone: waiting for the next one --\n");
                lines = tracer.reconnect()?;
            }
        }
    }
}

struct Tracer<'a> {
    wanted: &'a Wanted,
    began: Instant,
    /// When the worker began to tell.
    connected: Duration,
    shown: u64,
}

impl Tracer<'_> {
    /// Has a worker tell. What it tells, and which device that is.
    fn connect(&mut self) -> Result<(BufReader<File>, String), ControlError> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        // Less is enough where more is not allowed.
        let _ = fcntl_setpipe_size(&ours, PIPE_SIZE);
        let Wanted { guest, device, .. } = self.wanted;
        let path = Path::new(control::SOCKET_PATH);
        let device = control::trace(path, guest, device, theirs.as_fd())?;
        self.connected = self.began.elapsed();
        Ok((BufReader::new(ours.into()), device))
    }

    /// Connects once more, as soon as somebody serves the device.
    fn reconnect(&mut self) -> Result<BufReader<File>> {
        let limit = Instant::now() + RECONNECT_LIMIT;
        loop {
            // Whoever connects at once finds the worker that is going.
            sleep(RECONNECT_WAIT);
            match self.connect() {
                Ok((lines, _)) => return Ok(lines),
                Err(error) if Instant::now() >= limit => return Err(error.into()),
                Err(_) => {}
            }
        }
    }

    fn show(&mut self, lines: &mut BufReader<File>) -> Result<End> {
        let mut line = String::new();
        loop {
            if self.wanted.count.is_some_and(|count| self.shown >= count) {
                return Ok(End::Shown);
            }
            line.clear();
            let read = lines.by_ref().take(MAX_LINE).read_line(&mut line);
            if read.context("reading what the worker tells")? == 0 {
                return Ok(End::Lost);
            }
            match TraceLine::parse(&line).map_err(anyhow::Error::msg) {
                Ok(TraceLine::Request(mut request)) => {
                    let since = u64::try_from(self.connected.as_micros()).unwrap_or(u64::MAX);
                    request.at_us = request.at_us.saturating_add(since);
                    if !self.wanted.filter.shows(&request) {
                        continue;
                    }
                    self.shown += 1;
                    let text = match self.wanted.json {
                        true => serde_json::to_string(&request)?,
                        false => request.to_string(),
                    };
                    match writeln!(stdout(), "{text}") {
                        Err(error) if error.raw_os_error() == Some(Errno::PIPE.raw_os_error()) => {
                            return Ok(End::Shown);
                        }
                        written => written.context("writing what is told")?,
                    }
                }
                Ok(TraceLine::Missing(count)) => {
                    crate::say(&format!(
                        "-- {count} came faster than they were shown, and are missing here --\n"
                    ));
                }
                Ok(TraceLine::Replaced) => bail!("somebody else traces this device now"),
                Err(error) => return Err(error.context("what the worker tells is not understood")),
            }
        }
    }
}
