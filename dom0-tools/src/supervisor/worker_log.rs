//! What a worker logs, on its way into the service's own log: it says which guest it is of, and its guest cannot
//! have more of it than the supervisor lets through, whichever worker writes it.

use crate::text::{Lines, without_controls};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::process::ChildStderr;
use tracing::Level;

/// The reading end of a worker's standard error.
#[derive(Debug)]
pub(super) struct WorkerLog {
    lines: Lines<ChildStderr>,
}

impl WorkerLog {
    /// # Errors
    ///
    /// The system's.
    pub(super) fn new(pipe: ChildStderr) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        let lines = Lines::new(pipe);
        Ok(Self { lines })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.lines.pipe().as_raw_fd()
    }

    /// Hands what has arrived to `line`, line by line. False once the worker will write no more.
    pub(super) fn read(&mut self, mut line: impl FnMut(Level, &str)) -> bool {
        self.lines.read(|bytes| hand_over(bytes, &mut line))
    }
}

fn hand_over(bytes: &[u8], line: &mut impl FnMut(Level, &str)) {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    let begins_with_level = text
        .split_once(' ')
        .and_then(|(level, rest)| Some((level.parse().ok()?, rest)));
    let (level, rest) = begins_with_level.unwrap_or((Level::ERROR, text));
    line(level, &without_controls(rest.trim_start().chars()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::MAX_LINE;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn lines_are_handed_over_with_their_level_and_no_control_characters() {
        let mut child = Command::new("sh")
            .args(["-c", "cat >&2"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let long = "x".repeat(MAX_LINE);
        let said = format!(" WARN a disk\u{1b}[2J is slow\nthread panicked\n{long}y\nDEBUG end");
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(said.as_bytes()).unwrap();
        drop(stdin);
        let mut log = WorkerLog::new(child.stderr.take().unwrap()).unwrap();
        child.wait().unwrap();
        let mut lines = Vec::new();
        while log.read(|level, line| lines.push((level, line.to_owned()))) {}
        let expected = [
            (Level::WARN, "a disk\u{fffd}[2J is slow".to_owned()),
            (Level::ERROR, "thread panicked".to_owned()),
            (Level::ERROR, long),
            (Level::ERROR, "y".to_owned()),
            (Level::DEBUG, "end".to_owned()),
        ];
        assert_eq!(lines, expected);
    }
}
