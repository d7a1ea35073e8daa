//! Events, as the driver gets them and as Linux has them.

/// Types of events (`linux/input-event-codes.h`).
pub mod kind {
    pub const SYNCHRONIZE: u16 = 0;
    pub const KEY: u16 = 1;
    pub const RELATIVE: u16 = 2;
    pub const ABSOLUTE: u16 = 3;
    pub const MISC: u16 = 4;
    pub const SWITCH: u16 = 5;
}

/// `SYN_REPORT`: what came before has happened at once; `SYN_MT_REPORT`: one finger's part of it ends; `SYN_DROPPED`: Linux has lost
/// events.
const REPORT: u16 = 0;
const FINGER_REPORT: u16 = 2;
const DROPPED: u16 = 3;

/// Keys that there can be: `KEY_CNT`.
pub(super) const KEYS: usize = 0x300;

/// What has happened to an input device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: u16,
    pub code: u16,
    pub value: i32,
}

impl Event {
    /// `SYN_REPORT`: what came before has happened at once.
    pub const REPORT: Self = Self {
        kind: kind::SYNCHRONIZE,
        code: REPORT,
        value: 0,
    };

    /// Bytes of `struct virtio_input_event`.
    pub(super) const BYTES: usize = 8;

    /// As a driver reads it (virtio 1.3, 5.8.6).
    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let [a, b] = self.kind.to_le_bytes();
        let [c, d] = self.code.to_le_bytes();
        let [e, f, g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// Bytes of Linux's `struct input_event`, which ends with what a driver gets, after a time.
    pub(super) const OF_LINUX: usize = size_of::<libc::input_event>();

    /// As Linux writes it.
    pub(super) fn of_linux(bytes: &[u8; Self::OF_LINUX]) -> Self {
        let end = bytes.last_chunk().expect("more bytes than that");
        let [a, b, c, d, value @ ..]: [u8; Self::BYTES] = *end;
        Self {
            kind: u16::from_ne_bytes([a, b]),
            code: u16::from_ne_bytes([c, d]),
            value: i32::from_ne_bytes(value),
        }
    }

    /// A key that is pressed, or is so no more.
    pub(super) fn key(code: u16, is_pressed: bool) -> Self {
        Self {
            kind: kind::KEY,
            code,
            value: i32::from(is_pressed),
        }
    }

    /// Whether it says where a report, or a finger's part of it, ends: Linux says by its value which of its own reports it is.
    pub fn is_end(self) -> bool {
        self.kind == kind::SYNCHRONIZE && [REPORT, FINGER_REPORT].contains(&self.code)
    }

    /// Linux has lost events before this one.
    pub(super) fn is_dropped(self) -> bool {
        (self.kind, self.code) == (kind::SYNCHRONIZE, DROPPED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_what_linux_says() {
        let event = Event {
            kind: 0x0102,
            code: 0x0304,
            value: -2,
        };
        assert_eq!(event.to_bytes(), [2, 1, 4, 3, 0xfe, 255, 255, 255]);
        let mut bytes = [9; Event::OF_LINUX];
        let end = bytes.last_chunk_mut().unwrap();
        *end = if cfg!(target_endian = "little") {
            event.to_bytes()
        } else {
            [1, 2, 3, 4, 255, 255, 255, 0xfe]
        };
        assert_eq!(Event::of_linux(&bytes), event);
        let end = |code| Event {
            kind: 0,
            code,
            value: 1,
        };
        let ends = [0, 1, 2, 3].map(|code| (end(code).is_end(), end(code).is_dropped()));
        let (no, report, lost) = ((false, false), (true, false), (false, true));
        assert_eq!(ends, [report, no, report, lost]);
    }
}
