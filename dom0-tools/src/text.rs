//! Text of others, for logs and terminals.

use std::io::{self, Read};

/// `text` on one line, without what a terminal would handle_commands.
pub(crate) fn without_controls(text: impl Iterator<Item = char>) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.map(shown).collect()
}

/// Bytes that are looked at as one line.
pub(crate) const MAX_LINE: usize = 1024;
/// Reads at a time: more than a pipe holds, of which nothing else would tell, and no more, so that one process's lines do not
/// keep the others waiting.
const READS: usize = 20;

/// What a process prints into a pipe that does not block, line by line.
#[derive(Debug)]
pub(crate) struct Lines<P> {
    pipe: P,
    /// The beginning of a line.
    begun: Vec<u8>,
}

impl<P: Read> Lines<P> {
    pub(crate) fn new(pipe: P) -> Self {
        let begun = Vec::new();
        Self { pipe, begun }
    }

    pub(crate) fn pipe(&self) -> &P {
        &self.pipe
    }

    /// Hands what has arrived to `line`. False once there will be no more.
    pub(crate) fn read(&mut self, mut line: impl FnMut(&[u8])) -> bool {
        let mut bytes = [0; 4096];
        for _ in 0..READS {
            let len = match self.pipe.read(&mut bytes) {
                Ok(0) => {
                    self.finish(line);
                    return false;
                }
                Ok(len) => len,
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            };
            for &byte in &bytes[..len] {
                if byte != b'\n' {
                    self.begun.push(byte);
                }
                if byte == b'\n' || self.begun.len() == MAX_LINE {
                    line(&self.begun);
                    self.begun.clear();
                }
            }
        }
        true
    }

    /// Hands over the last line, which had no end.
    pub(crate) fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.begun.is_empty() {
            line(&std::mem::take(&mut self.begun));
        }
    }
}

/// A number for a text, the same in every version of this program (FNV-1a).
pub(crate) fn stable_hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
