//! Where a device's requests are told of: a pipe to whoever looks on, which nothing waits for.

use crate::ctl::trace::{RequestLine, TraceLine};
use rustix::io::{Errno, write};
use rustix::pipe::PIPE_BUF;
use std::os::fd::OwnedFd;
use std::time::Instant;
use xen_virtio_backend::{TraceSink, TracedRequest};
use xen_virtio_guest_mapping::syscalls;

/// As much as comes between two looks at the pipe.
const MAX_PARCELS: usize = 16;

/// Whole lines, which a pipe takes together or not at all.
#[derive(Default)]
struct Parcel {
    lines: Vec<u8>,
    /// The requests that they tell of.
    count: u64,
}

pub(super) struct TracePipe {
    pipe: OwnedFd,
    began: Instant,
    /// What is to be written when the driver has been told of what came.
    parcels: Vec<Parcel>,
    /// Requests that nobody was told of, since the pipe was full.
    missing: u64,
    has_reader: bool,
}

impl TracePipe {
    /// `pipe` never blocks.
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self {
            pipe,
            began: Instant::now(),
            parcels: Vec::new(),
            missing: 0,
            has_reader: true,
        }
    }

    /// Adds a line, which tells of `count` requests. False if there is no room.
    fn add(&mut self, line: &TraceLine, count: u64) -> bool {
        let mut line = serde_json::to_vec(line).expect("it has no map with odd keys");
        line.push(b'\n');
        let fits = |last: &Parcel| last.lines.len() + line.len() <= PIPE_BUF;
        if !self.parcels.last().is_some_and(fits) {
            if self.parcels.len() == MAX_PARCELS {
                return false;
            }
            self.parcels.push(Parcel::default());
        }
        let parcel = self.parcels.last_mut().expect("it has room");
        parcel.lines.append(&mut line);
        parcel.count += count;
        true
    }

    /// Tells of what is missing, if nothing is to be told of before that.
    fn add_gap(&mut self) {
        if self.missing > 0 && self.parcels.is_empty() {
            let missing = std::mem::take(&mut self.missing);
            self.add(&TraceLine::Missing(missing), missing);
        }
    }

    fn write(&mut self) {
        let mut is_full = false;
        for parcel in self.parcels.drain(..) {
            if !is_full {
                syscalls::count();
                match write(&self.pipe, &parcel.lines) {
                    Ok(_) => continue,
                    Err(Errno::AGAIN | Errno::INTR | Errno::NOMEM) => is_full = true,
                    Err(_) => self.has_reader = false,
                }
            }
            // What follows is missing too, though there may be room again: a gap is in one place.
            self.missing += parcel.count;
        }
    }
}

impl TraceSink for TracePipe {
    fn request(&mut self, request: &TracedRequest) {
        let at = self.began.elapsed();
        self.add_gap();
        let line = TraceLine::Request(RequestLine::new(at, request));
        if self.missing > 0 || !self.add(&line, 1) {
            self.missing += 1;
        }
    }

    fn flush(&mut self) -> bool {
        self.write();
        self.has_reader
    }

    fn replaced(&mut self) {
        self.add_gap();
        self.add(&TraceLine::Replaced, 0);
        self.write();
    }
}

impl Drop for TracePipe {
    fn drop(&mut self) {
        self.add_gap();
        self.write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::fs::File;
    use std::io::Read;
    use std::time::Duration;
    use xen_virtio_backend::QueueIndex;

    fn pipe() -> (File, TracePipe) {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (ours.into(), TracePipe::new(theirs))
    }

    fn request(head: u16) -> TracedRequest {
        TracedRequest {
            queue: QueueIndex::new(0, 1).unwrap(),
            head,
            readable: 16,
            writable: 1,
            written: 1,
            took: Duration::from_micros(7),
            detail: None,
        }
    }

    /// What can be read now.
    fn read(from: &mut File) -> Vec<TraceLine> {
        let mut text = String::new();
        // It ends where nothing is left, which is an error of a pipe that never blocks.
        let _ = from.read_to_string(&mut text);
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn heads(lines: &[TraceLine]) -> Vec<u16> {
        let heads = lines.iter().filter_map(|line| match line {
            TraceLine::Request(request) => Some(request.head),
            _ => None,
        });
        heads.collect()
    }

    #[test]
    fn what_is_told_arrives_in_order() {
        let (mut ours, mut theirs) = pipe();
        for head in 0..200 {
            theirs.request(&request(head));
        }
        assert!(theirs.flush());
        theirs.replaced();
        let lines = read(&mut ours);
        assert_eq!(heads(&lines), (0..200).collect::<Vec<_>>());
        assert_eq!(lines.last(), Some(&TraceLine::Replaced));
    }

    #[test]
    fn what_a_full_pipe_does_not_take_is_counted() {
        let (mut ours, mut theirs) = pipe();
        let told = 5000;
        for head in 0..told {
            theirs.request(&request(head));
            assert!(theirs.flush());
        }
        let mut shown = heads(&read(&mut ours)).len() as u64;
        assert!((100..4000).contains(&shown), "{shown}");
        theirs.request(&request(told));
        assert!(theirs.flush());
        let lines = read(&mut ours);
        let [TraceLine::Missing(missing), TraceLine::Request(last)] = &lines[..] else {
            panic!("{lines:?}")
        };
        shown += 1;
        assert_eq!((last.head, shown + missing), (told, u64::from(told) + 1));
    }

    #[test]
    fn a_gap_is_told_of_where_it_is_and_at_the_end() {
        for is_replaced in [false, true] {
            let (mut ours, mut theirs) = pipe();
            // More than is kept between two looks.
            for head in 0..2000 {
                theirs.request(&request(head));
            }
            assert!(theirs.flush());
            let shown = heads(&read(&mut ours));
            let kept = u16::try_from(shown.len()).unwrap();
            assert_eq!(shown, (0..kept).collect::<Vec<_>>());
            assert!((400..2000).contains(&kept), "{kept}");
            let mut expected = vec![TraceLine::Missing((2000 - kept).into())];
            if is_replaced {
                theirs.replaced();
                expected.push(TraceLine::Replaced);
            }
            drop(theirs);
            assert_eq!(read(&mut ours), expected);
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_told_of_nothing() {
        let (ours, mut theirs) = pipe();
        drop(ours);
        theirs.request(&request(1));
        assert!(!theirs.flush());
    }
}
