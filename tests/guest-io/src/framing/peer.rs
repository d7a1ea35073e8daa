//! Whoever is at the other end of a network device's cable, and does what the guest's frames ask of it.

use crate::net::{HEADER, frame};
use std::io;
use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM;

/// Its address.
pub const PEER: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 9];
/// The types of frames that ask and that answer: Ethernet's two for experiments (IEEE 802, 9.2.3).
const ASKS: [u8; 2] = [0x88, 0xb5];
const ANSWERS: [u8; 2] = [0x88, 0xb6];
/// Bytes of an Ethernet frame before its contents.
const ETHERNET: usize = 14;
/// Bytes of the smallest frame that asks.
pub const SMALLEST: usize = ETHERNET + 8;
/// Where the sum of a frame begins that is to be completed, behind what would be IP's header, and its place behind that.
pub const SUM_START: u16 = 34;
pub const SUM_OFFSET: u16 = 6;
/// The frame is the driver's to complete (virtio 1.3, 5.1.6).
pub const NEEDS_CSUM: u8 = 1;
const _: () = assert!(NEEDS_CSUM as u32 == VIRTIO_NET_HDR_F_NEEDS_CSUM);
/// Frames that are sent without a look at what is asked next.
const FRAMES_PER_LOOK: u32 = 16;

/// The peer's end of the cable: frames with a header, as virtio 1.3, 5.1.6 has it.
pub trait Cable {
    /// The next frame; where `wait` is false, only one that is there.
    ///
    /// # Errors
    ///
    /// The interface's.
    fn receive(&mut self, wait: bool) -> io::Result<Option<Vec<u8>>>;

    /// # Errors
    ///
    /// The interface's.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
}

/// What a frame asks for. The next one ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The same contents.
    Echo,
    /// Numbered frames of this many bytes, whose other contents are `mark`.
    Send { count: u32, len: u16, mark: u8 },
    /// A frame of this many bytes, whose checksum is to be completed.
    Partial { len: u16 },
    /// Nothing any more.
    End,
}

impl Order {
    /// A frame of `len` bytes from `from` that asks for it, filled with `mark`, behind a header of zeros.
    ///
    /// # Panics
    ///
    /// If it is too small for that.
    pub fn frame(self, from: [u8; 6], len: usize, mark: u8) -> Vec<u8> {
        let mut asked = frame(PEER, len, mark);
        let (kind, [count, length, content]) = match self {
            Self::Echo => (0, [0; 3]),
            Self::Send { count, len, mark } => (1, [count, len.into(), mark.into()]),
            Self::Partial { len } => (2, [0, len.into(), 0]),
            Self::End => (3, [0; 3]),
        };
        let fields = [
            &from[..],
            &ASKS,
            &[kind, content.to_le_bytes()[0]],
            &length.to_le_bytes()[..2],
            &count.to_le_bytes(),
        ];
        let fields = fields.concat();
        asked[HEADER + 6..HEADER + SMALLEST].copy_from_slice(&fields);
        asked
    }

    /// What a frame, without its header, asks for, if it does.
    fn parse(frame: &[u8]) -> Option<Self> {
        let (ethernet, fields) = frame.split_at_checked(ETHERNET)?;
        let [kind, mark, low, high, count @ ..] = fields.first_chunk::<8>()?;
        let len = u16::from_le_bytes([*low, *high]);
        let count = u32::from_le_bytes(*count);
        if ethernet[12..] != ASKS {
            return None;
        }
        match kind {
            0 => Some(Self::Echo),
            1 => Some(Self::Send {
                count,
                len,
                mark: *mark,
            }),
            2 => Some(Self::Partial { len }),
            3 => Some(Self::End),
            _ => None,
        }
    }
}

/// What the peer makes of a frame, which has a header, before it sends it back.
pub fn echoed(asked: &[u8]) -> Vec<u8> {
    let mut answer = asked.to_vec();
    answer[..HEADER].fill(0);
    let [to, from] = [HEADER..HEADER + 6, HEADER + 6..HEADER + 12];
    answer.copy_within(from.clone(), to.start);
    answer[from].copy_from_slice(&PEER);
    answer[HEADER + 12..HEADER + ETHERNET].copy_from_slice(&ANSWERS);
    answer
}

/// A frame of the peer's with its header, for `to`.
fn answer(to: [u8; 6], len: u16, mark: u8) -> Vec<u8> {
    let mut answer = frame(to, usize::from(len).max(ETHERNET), mark);
    answer[HEADER + 6..HEADER + 12].copy_from_slice(&PEER);
    answer[HEADER + 12..HEADER + ETHERNET].copy_from_slice(&ANSWERS);
    answer
}

/// The number of a frame that [`Order::Send`] has brought, with its header, and its mark.
pub fn number_and_mark(frame: &[u8]) -> Option<(u32, u8)> {
    let (number, rest) = frame.get(HEADER + ETHERNET..)?.split_first_chunk::<4>()?;
    let answers = frame[HEADER + 12..HEADER + ETHERNET] == ANSWERS;
    answers.then_some((u32::from_le_bytes(*number), *rest.first()?))
}

/// Does what is asked, until that is to end.
///
/// # Errors
///
/// The cable's.
pub fn serve(cable: &mut dyn Cable) -> io::Result<()> {
    let mut next = None;
    loop {
        let asked = match next.take() {
            Some(asked) => asked,
            None => cable.receive(true)?.unwrap_or_default(),
        };
        let Some(order) = asked.get(HEADER..).and_then(Order::parse) else {
            continue;
        };
        let from = asked[HEADER + 6..HEADER + 12]
            .try_into()
            .expect("six bytes");
        match order {
            Order::Echo => cable.send(&echoed(&asked))?,
            Order::Send { count, len, mark } => {
                let mut frame = answer(from, len.max(20), mark);
                for number in 0..count {
                    if number % FRAMES_PER_LOOK == FRAMES_PER_LOOK - 1 {
                        next = cable.receive(false)?;
                    }
                    if next.is_some() {
                        break;
                    }
                    frame[HEADER + ETHERNET..HEADER + ETHERNET + 4]
                        .copy_from_slice(&number.to_le_bytes());
                    cable.send(&frame)?;
                }
            }
            Order::Partial { len } => {
                let mut frame = answer(from, len.max(SUM_START + SUM_OFFSET + 2), 0x5a);
                frame[0] = NEEDS_CSUM;
                frame[6..8].copy_from_slice(&SUM_START.to_le_bytes());
                frame[8..10].copy_from_slice(&SUM_OFFSET.to_le_bytes());
                let sum = HEADER + usize::from(SUM_START + SUM_OFFSET);
                frame[sum..sum + 2].fill(0);
                cable.send(&frame)?;
            }
            Order::End => return Ok(()),
        }
    }
}
