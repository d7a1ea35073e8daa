//! Where a device's requests are told of: a pipe to whoever looks on, which nothing waits for.

use crate::ctl::trace::{RequestLine, TraceLine};
use rustix::io::{Errno, write};
use rustix::pipe::PIPE_BUF;
use std::os::fd::OwnedFd;
use std::time::Instant;
use xen_virtio_backend::{TraceSink, TracedRequest};

pub(super) struct TracePipe {
    pipe: OwnedFd,
    began: Instant,
    /// Whole lines, which a pipe takes together or not at all.
    lines: Vec<u8>,
    count: u64,
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
            lines: Vec::new(),
            count: 0,
            missing: 0,
            has_reader: true,
        }
    }

    fn add(&mut self, line: &TraceLine) {
        let mut line = serde_json::to_vec(line).expect("it has no map with odd keys");
        line.push(b'\n');
        if self.lines.len() + line.len() > PIPE_BUF {
            self.write();
        }
        self.lines.append(&mut line);
    }

    fn write(&mut self) {
        match write(&self.pipe, &self.lines) {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR | Errno::NOMEM) => self.missing += self.count,
            Err(_) => self.has_reader = false,
        }
        self.lines.clear();
        self.count = 0;
    }
}

impl TraceSink for TracePipe {
    fn request(&mut self, request: &TracedRequest) {
        let at = self.began.elapsed();
        if self.missing > 0 && self.lines.is_empty() {
            let missing = self.missing;
            self.add(&TraceLine::Missing(missing));
            self.missing = 0;
            self.count = missing;
        }
        self.add(&TraceLine::Request(RequestLine::new(at, request)));
        self.count += 1;
    }

    fn flush(&mut self) -> bool {
        self.write();
        self.has_reader
    }

    fn replaced(&mut self) {
        self.add(&TraceLine::Replaced);
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
    fn a_reader_that_is_gone_is_told_of_nothing() {
        let (ours, mut theirs) = pipe();
        drop(ours);
        theirs.request(&request(1));
        assert!(!theirs.flush());
    }
}
