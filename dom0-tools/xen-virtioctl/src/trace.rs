//! Looks on at the requests of a device.

use crate::patience::Patience;
use anyhow::{Context, Result, bail, ensure};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Write, stdout};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::ctl::control::{self, ControlError};
use xen_virtio_dom0_tools::ctl::trace::{Filter, HEADING, TraceLine};

/// Bytes that may wait to be read: some thousand requests.
const PIPE_SIZE: usize = 1 << 20;
/// The longest line is much shorter.
const MAX_LINE: u64 = 4096;

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
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// As much was shown as was asked for, or nobody reads it any more.
    Shown,
    /// The worker is gone, or has the device no more. It has told so many lines.
    Lost { told: u64 },
}

/// Shows the requests of a device until as many were shown as are wanted.
///
/// # Errors
///
/// What keeps it from going on.
pub(crate) fn run(wanted: &Wanted) -> Result<()> {
    let mut tracer = Tracer::new(wanted);
    let (mut lines, device) = tracer.connect(false)?;
    crate::say(&format!("{device}; Ctrl-C ends\n"));
    if !wanted.json {
        crate::say(HEADING);
    }
    let mut patience = Patience::begin();
    loop {
        let End::Lost { told } = tracer.show(&mut lines, &mut stdout())? else {
            return Ok(());
        };
        // One that ends each connection at once is not asked for ever.
        if told > 0 {
            patience = Patience::begin();
            crate::say("-- nothing more comes of its worker: waiting for another one --\n");
        }
        let next;
        (lines, next) = tracer.reconnect(&patience)?;
        ensure!(device == next, "another device is called so now: {next}");
    }
}

struct Tracer<'a> {
    wanted: &'a Wanted,
    began: Instant,
    /// When the worker began to tell.
    connected: Duration,
    shown: u64,
}

impl<'a> Tracer<'a> {
    fn new(wanted: &'a Wanted) -> Self {
        Self {
            wanted,
            began: Instant::now(),
            connected: Duration::ZERO,
            shown: 0,
        }
    }

    /// Has a worker tell. What it tells, and which device that is.
    fn connect(&mut self, goes_on: bool) -> Result<(BufReader<File>, String), ControlError> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        // Less is enough where more is not allowed.
        let _ = fcntl_setpipe_size(&ours, PIPE_SIZE);
        let Wanted { guest, device, .. } = self.wanted;
        let path = Path::new(control::SOCKET_PATH);
        let device = control::trace(path, guest, device, goes_on, theirs.as_fd())?;
        self.connected = self.began.elapsed();
        Ok((BufReader::new(ours.into()), device))
    }

    /// Connects once more, as soon as somebody serves the device.
    fn reconnect(&mut self, patience: &Patience) -> Result<(BufReader<File>, String)> {
        loop {
            patience.rest();
            match self.connect(true) {
                Ok(_) if patience.is_over() => bail!("its worker tells nothing"),
                Ok(connected) => return Ok(connected),
                Err(error) => patience.bear(error)?,
            }
        }
    }

    /// Shows in `out` what `lines` tell.
    fn show(&mut self, lines: &mut impl BufRead, out: &mut impl Write) -> Result<End> {
        let mut line = String::new();
        for told in 0.. {
            if self.wanted.count.is_some_and(|count| self.shown >= count) {
                return Ok(End::Shown);
            }
            line.clear();
            let read = io::Read::take(&mut *lines, MAX_LINE).read_line(&mut line);
            if read.context("reading what the worker tells")? == 0 {
                return Ok(End::Lost { told });
            }
            match TraceLine::parse(&line)? {
                TraceLine::Request(mut request) => {
                    let since = u64::try_from(self.connected.as_micros()).unwrap_or(u64::MAX);
                    request.at_us = request.at_us.saturating_add(since);
                    let filter = &self.wanted.filter;
                    ensure!(
                        !filter.is_in_vain(&request),
                        "of this device's requests nobody knows what they ask for: leave --what and --failed out"
                    );
                    if !filter.shows(&request) {
                        continue;
                    }
                    self.shown += 1;
                    let text = match self.wanted.json {
                        true => serde_json::to_string(&request)?,
                        false => request.to_string(),
                    };
                    match writeln!(out, "{text}") {
                        Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                            return Ok(End::Shown);
                        }
                        written => written.context("writing what is told")?,
                    }
                }
                TraceLine::Missing(count) => {
                    crate::say(&format!(
                        "-- {count} requests came faster than they were read, and are missing here --\n"
                    ));
                }
                TraceLine::Replaced => bail!("somebody else traces this device now"),
            }
        }
        unreachable!("it has told as many as can be counted")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const READ: &str = r#"{"request":{"at_us":1000000,"took_us":131,"queue":0,"head":12,"readable":16,"writable":4097,"written":4097,"detail":{"what":"read","offset":0,"bytes":4096,"failed":false}}}"#;
    const OTHER: &str = r#"{"request":{"at_us":2000000,"took_us":9,"queue":1,"head":3,"readable":64,"writable":0,"written":0}}"#;

    /// How `lines` end, and what is shown of them.
    fn shown(wanted: &Wanted, lines: &[&str]) -> (Result<End>, String) {
        let mut out = Vec::new();
        let mut tracer = Tracer::new(wanted);
        let ended = tracer.show(&mut Cursor::new(lines.join("\n") + "\n"), &mut out);
        (ended, String::from_utf8(out).unwrap())
    }

    fn wanted(filter: Filter, count: Option<u64>, json: bool) -> Wanted {
        Wanted {
            guest: "g".to_owned(),
            device: "virtio/0".to_owned(),
            filter,
            count,
            json,
        }
    }

    #[test]
    fn what_is_told_is_shown_until_there_is_no_more() {
        let all = wanted(Filter::default(), None, false);
        let (ended, text) = shown(&all, &[READ, r#"{"missing":7}"#, OTHER]);
        assert_eq!(ended.unwrap(), End::Lost { told: 3 });
        assert_eq!(text.lines().count(), 2, "{text}");
        let two = wanted(Filter::default(), Some(2), true);
        let (ended, text) = shown(&two, &[READ, READ, READ]);
        assert_eq!(ended.unwrap(), End::Shown);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("\"what\":\"read\""), "{text}");
        let slow = Filter {
            slower_than: Duration::from_micros(100),
            ..Filter::default()
        };
        let (ended, text) = shown(&wanted(slow, None, false), &[OTHER, READ, OTHER]);
        assert_eq!(ended.unwrap(), End::Lost { told: 3 });
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn what_ends_a_trace_is_said() {
        let all = wanted(Filter::default(), None, false);
        let long = "x".repeat(5000);
        for (line, expected) in [
            (r#""replaced""#, "somebody else traces"),
            ("nonsense", "is not understood"),
            (&long, "is not understood"),
        ] {
            let error = shown(&all, &[READ, line]).0.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let failed = Filter {
            failed: true,
            ..Filter::default()
        };
        let (ended, _) = shown(&wanted(failed, None, false), &[READ, OTHER]);
        assert!(ended.unwrap_err().to_string().contains("leave --what"));
    }
}
