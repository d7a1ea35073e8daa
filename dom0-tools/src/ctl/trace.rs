//! What `xen-virtioctl trace` shows: the requests of one device, as its driver gets them back.

use serde::{Deserialize, Serialize};
use std::fmt::{self, Display, Formatter};
use std::time::Duration;
use xen_virtio_backend::TracedRequest;

/// What a worker writes, a line of JSON each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceLine {
    Request(RequestLine),
    /// So many requests came faster than they were read, and are not told of.
    Missing(u64),
    /// Somebody else looks on from now on.
    Replaced,
}

/// A worker has written what is no [`TraceLine`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the worker tells what is not understood: is it of another version?")]
pub struct NoLine;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestLine {
    /// Microseconds from the beginning of the trace until the driver had it back.
    pub at_us: u64,
    /// … and from when the device took it until then.
    pub took_us: u64,
    pub queue: usize,
    /// The descriptor that its chain begins with.
    pub head: u16,
    /// Bytes of its device-readable and of its device-writable buffers, and those that the device has written.
    pub readable: usize,
    pub writable: usize,
    pub written: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<RequestDetail>,
}

/// What only the device knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestDetail {
    /// What is asked for, in a word.
    pub what: String,
    /// The bytes of the device's that it is about.
    pub offset: u64,
    pub bytes: u64,
    pub failed: bool,
}

/// The longest word for a request.
const MAX_WORD: usize = 16;

impl RequestLine {
    /// `request`, which was given back `at` after the beginning.
    pub(crate) fn new(at: Duration, request: &TracedRequest) -> Self {
        Self {
            at_us: microseconds(at),
            took_us: microseconds(request.took),
            queue: request.queue.get(),
            head: request.head,
            readable: request.readable,
            writable: request.writable,
            written: request.written,
            detail: request.detail.map(|detail| RequestDetail {
                what: detail.what.to_owned(),
                offset: detail.offset,
                bytes: detail.bytes,
                failed: detail.has_failed,
            }),
        }
    }
}

impl TraceLine {
    /// What `line` says.
    ///
    /// # Errors
    ///
    /// What it is not: a worker's line, whose words are fit for terminals.
    pub fn parse(line: &str) -> Result<Self, NoLine> {
        // What the parser says repeats what it was given.
        let parsed = serde_json::from_str(line).map_err(|_| NoLine)?;
        let is_usual = |c: char| c.is_ascii_lowercase() || c == '-';
        match &parsed {
            Self::Request(RequestLine {
                detail: Some(RequestDetail { what, .. }),
                ..
            }) if what.len() > MAX_WORD || !what.chars().all(is_usual) => Err(NoLine),
            Self::Missing(0) => Err(NoLine),
            _ => Ok(parsed),
        }
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The heading of what [`RequestLine`] shows.
pub const HEADING: &str = "     seconds  took µs  queue  head  request\n";

impl Display for RequestLine {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            at_us,
            took_us,
            queue,
            head,
            readable,
            writable,
            written,
            detail,
        } = self;
        let (seconds, rest) = (at_us / 1_000_000, at_us % 1_000_000);
        write!(f, "{seconds:5}.{rest:06} {took_us:8} {queue:6} {head:5}  ")?;
        let Some(RequestDetail {
            what,
            offset,
            bytes,
            failed,
        }) = detail
        else {
            return write!(
                f,
                "{readable} bytes from the guest, {written} of {writable} to it"
            );
        };
        f.write_str(what)?;
        if *bytes > 0 {
            write!(f, " {bytes} bytes at {offset}")?;
        }
        match failed {
            true => f.write_str(": failed"),
            false => Ok(()),
        }
    }
}

/// Which requests are shown.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of this queue alone.
    pub queue: Option<usize>,
    /// Those that are called so.
    pub what: Option<String>,
    /// Those that took at least so long.
    pub slower_than: Duration,
    /// Those whose driver was told of an error.
    pub failed: bool,
}

impl Filter {
    pub fn shows(&self, request: &RequestLine) -> bool {
        let detail = request.detail.as_ref();
        self.queue.is_none_or(|queue| queue == request.queue)
            && self
                .what
                .as_ref()
                .is_none_or(|what| detail.is_some_and(|detail| detail.what == *what))
            && u128::from(request.took_us) >= self.slower_than.as_micros()
            && (!self.failed || detail.is_some_and(|detail| detail.failed))
    }

    /// Whether it asks for what nobody knows of such a request.
    pub fn is_in_vain(&self, request: &RequestLine) -> bool {
        request.detail.is_none() && (self.failed || self.what.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read() -> RequestLine {
        RequestLine {
            at_us: 2_001_204,
            took_us: 131,
            queue: 0,
            head: 12,
            readable: 16,
            writable: 4097,
            written: 4097,
            detail: Some(RequestDetail {
                what: "read".to_owned(),
                offset: 1 << 20,
                bytes: 4096,
                failed: false,
            }),
        }
    }

    #[test]
    fn a_request_has_a_line_under_its_heading() {
        let mut flush = read();
        flush.detail = Some(RequestDetail {
            what: "flush".to_owned(),
            offset: 0,
            bytes: 0,
            failed: true,
        });
        let other = RequestLine {
            detail: None,
            ..read()
        };
        let shown = format!("{HEADING}{}\n{flush}\n{other}", read());
        let expected = "     seconds  took µs  queue  head  request
    2.001204      131      0    12  read 4096 bytes at 1048576
    2.001204      131      0    12  flush: failed
    2.001204      131      0    12  16 bytes from the guest, 4097 of 4097 to it";
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_a_worker_says_is_read_if_it_can_be_shown() {
        let line = TraceLine::Request(read());
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(TraceLine::parse(&text), Ok(line));
        for word in ["\u{1b}[2J", "a very, very long word", "READ"] {
            let mut other = read();
            other.detail.as_mut().unwrap().what = word.to_owned();
            let text = serde_json::to_string(&TraceLine::Request(other)).unwrap();
            assert!(TraceLine::parse(&text).is_err(), "{word}");
        }
        for line in [
            "{",
            "{\"missing\":0}",
            // A word that the parser would repeat.
            "{\"\\u001b[2J\":1}",
            "{\"request\":{\"took_us\":\"\\u001b[2J\"}}",
        ] {
            let error = TraceLine::parse(line).unwrap_err().to_string();
            assert!(!error.contains(char::is_control), "{line}");
        }
    }

    #[test]
    fn a_filter_leaves_what_was_asked_for() {
        let mut failed = read();
        failed.detail.as_mut().unwrap().failed = true;
        let bare = RequestLine {
            detail: None,
            ..read()
        };
        let slow = |microseconds| Filter {
            slower_than: Duration::from_micros(microseconds),
            ..Filter::default()
        };
        let what = |what: &str| Filter {
            what: Some(what.to_owned()),
            ..Filter::default()
        };
        let queue = |queue| Filter {
            queue: Some(queue),
            ..Filter::default()
        };
        let only_failed = Filter {
            failed: true,
            ..Filter::default()
        };
        for (filter, request, shows) in [
            (Filter::default(), &bare, true),
            (slow(131), &bare, true),
            (slow(132), &bare, false),
            (what("read"), &read(), true),
            (what("write"), &read(), false),
            (what("read"), &bare, false),
            (queue(0), &bare, true),
            (queue(1), &bare, false),
            (only_failed.clone(), &failed, true),
            (only_failed.clone(), &read(), false),
            (only_failed, &bare, false),
        ] {
            assert_eq!(filter.shows(request), shows, "{filter:?} {request:?}");
        }
    }
}
