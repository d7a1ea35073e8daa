//! What becomes of the requests that a back-end had when it was lost: some of what they ask for may be done already.

use super::relaying::{Plan, Relaying};
use vm_memory::VolatileSlice;

/// `EIO` (`asm-generic/errno-base.h`).
const EIO: i32 = 5;

/// What becomes of a request that a back-end, or an earlier process, had taken and not finished. Those that only wait for
/// something to be written to them are repeated, unless that is what the driver is told by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It is carried out once more: what is done twice is as if it were done once.
    Repeat,
    /// The driver is told that it has failed.
    Fail(Answer),
    /// The driver is told of the loss, as of anything else that this queue is there for.
    Tell(Answer),
}

/// What is known of the back-ends of a type of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// By queue; the last one stands for all that follow.
    pub loss: &'static [Loss],
    /// Some say that they have written more than a request has room for, where no driver looks at that: it counts as all that
    /// there is room for.
    pub overstate: bool,
    /// Requests end soon, and one as soon as another: results are worth waiting for, to be delivered together.
    pub alike: bool,
}

impl Rules {
    /// What becomes of the requests of queue `index`.
    pub(super) fn loss(&self, index: usize) -> Loss {
        let loss = self.loss.get(index).or(self.loss.last());
        loss.copied().expect("one for each queue, or for all")
    }
}

/// How a device says that a request has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It writes nothing.
    Nothing,
    /// Its last writable byte.
    LastByte(u8),
    /// Its first four writable bytes, little-endian.
    FirstWord(u32),
    /// Its last eight writable bytes: a number of four bytes, little-endian, and zeros.
    LastWords(u32),
    /// A `struct fuse_out_header` with `EIO` for the `struct fuse_in_header` that it begins with (`linux/fuse.h`).
    Fuse,
}

impl Loss {
    /// Whether a request of this plan fails when its back-end is lost.
    pub(super) fn fails(&self, plan: &Plan) -> bool {
        match self {
            Self::Repeat => false,
            Self::Fail(_) => !plan.receives,
            Self::Tell(_) => true,
        }
    }

    /// Whether what was answered so has failed.
    pub(super) fn is_failure(&self) -> bool {
        matches!(self, Self::Fail(_))
    }

    /// Writes into the region what tells the driver that the request has failed.
    pub(super) fn answer(&self, relaying: &mut Relaying, memory: &VolatileSlice<'_>) {
        let (Self::Fail(answer) | Self::Tell(answer)) = self else {
            return;
        };
        let room = relaying.room();
        let (skip, bytes) = match answer {
            Answer::Nothing => (0, Vec::new()),
            Answer::LastByte(status) => (room.saturating_sub(1), vec![*status]),
            Answer::FirstWord(word) => (0, word.to_le_bytes().to_vec()),
            Answer::LastWords(word) => {
                let words = u64::from(*word);
                (room.saturating_sub(8), words.to_le_bytes().to_vec())
            }
            Answer::Fuse => (0, fuse_error(&relaying.readable(16, memory))),
        };
        relaying.written = relaying.write(skip, &bytes, memory);
    }
}

/// `le32 len`, `le32 error`, `le64 unique`, for a request that begins with `le32 len`, `le32 opcode`, `le64 unique`.
fn fuse_error(request: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(16);
    header.extend(16u32.to_le_bytes());
    header.extend((-EIO).to_le_bytes());
    let unique = request.get(8..16).unwrap_or(&[0; 8]);
    header.extend(unique);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fuse_error_names_its_request() {
        let mut request = [0u8; 40];
        request[8..16].copy_from_slice(&0x0102_0304_0506_0708u64.to_le_bytes());
        let header = fuse_error(&request);
        assert_eq!(header[..4], 16u32.to_le_bytes());
        assert_eq!(header[4..8], (-5i32).to_le_bytes());
        assert_eq!(header[8..], 0x0102_0304_0506_0708u64.to_le_bytes());
        assert_eq!(fuse_error(&[1, 2])[8..], [0; 8]);
    }
}
