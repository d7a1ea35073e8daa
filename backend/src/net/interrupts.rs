//! When a driver is told of frames: at once, or some at a time, as it has asked (virtio 1.3, 5.1.6.5.7).

use crate::tuning::{SENT_DELAY_US, SENT_FRAMES};
use std::time::{Duration, Instant};

/// What a driver waits for before it is told. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moderation {
    /// So many frames.
    pub(super) max_packets: u32,
    /// Or so many microseconds since the first of them.
    pub(super) max_usecs: u32,
}

impl Moderation {
    /// That of frames that were sent by a queue of `size`, unless the driver has asked for another: nobody waits to hear of
    /// them, and a driver that is told of received frames looks at these too.
    pub(super) fn of_sent(size: u16) -> Self {
        Self {
            // A small queue is full before.
            max_packets: SENT_FRAMES.min(u32::from(size) / 4),
            max_usecs: SENT_DELAY_US,
        }
    }

    /// Bytes of `struct virtio_net_ctrl_coal`.
    pub(super) const BYTES: usize = 8;

    pub(super) fn read(bytes: [u8; Self::BYTES]) -> Self {
        let [p0, p1, p2, p3, u0, u1, u2, u3] = bytes;
        Self {
            max_packets: u32::from_le_bytes([p0, p1, p2, p3]),
            max_usecs: u32::from_le_bytes([u0, u1, u2, u3]),
        }
    }

    pub(super) fn bytes(self) -> [u8; Self::BYTES] {
        let [p0, p1, p2, p3] = self.max_packets.to_le_bytes();
        let [u0, u1, u2, u3] = self.max_usecs.to_le_bytes();
        [p0, p1, p2, p3, u0, u1, u2, u3]
    }
}

/// The interrupts of one queue.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    /// Frames since the last one.
    packets: u32,
    /// The driver wants one for them, some time.
    is_wanted: bool,
    /// When it is due at the latest.
    due_at: Option<Instant>,
}

impl Interrupts {
    /// `packets` frames were shown to the driver, which wants an interrupt for them or not. Whether it is to have one now.
    pub(super) fn shown(&mut self, packets: u32, is_wanted: bool, rule: Moderation) -> bool {
        self.is_wanted |= is_wanted;
        self.packets = self.packets.saturating_add(packets);
        if !self.is_wanted {
            return false;
        }
        if rule.max_usecs == 0 || self.packets >= rule.max_packets {
            return true;
        }
        let limit = Duration::from_micros(rule.max_usecs.into());
        self.due_at.get_or_insert_with(|| Instant::now() + limit);
        false
    }

    /// Whether the driver will have waited long enough at `time`.
    pub(super) fn is_due_by(&self, time: Instant) -> bool {
        self.due_at.is_some_and(|at| at <= time)
    }

    /// Whether the driver waits for one.
    pub(super) fn waits(&self) -> bool {
        self.due_at.is_some()
    }

    /// One that waits is due at once: it waited by a rule that holds no more.
    pub(super) fn hasten(&mut self) {
        if self.waits() {
            self.due_at = Some(Instant::now());
        }
    }

    pub(super) fn due_at(&self) -> Option<Instant> {
        self.due_at
    }

    /// The driver is interrupted, for whichever queue: it looks at all of them.
    pub(super) fn raised(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_waits_for_frames_or_time_but_not_for_nothing() {
        let some = Moderation {
            max_packets: 4,
            max_usecs: 2000,
        };
        assert_eq!(Moderation::read(some.bytes()), some);
        let mut interrupts = Interrupts::default();
        assert!(interrupts.shown(1, true, Moderation::default()));
        interrupts.raised();
        assert!(!interrupts.shown(9, false, some) && interrupts.due_at().is_none());
        // Those were before it wanted any, and count.
        assert!(interrupts.shown(1, true, some));
        interrupts.raised();
        assert!(!interrupts.shown(3, true, some) && !interrupts.is_due_by(Instant::now()));
        // Wanted once is wanted until it comes.
        assert!(interrupts.shown(1, false, some));
        interrupts.raised();
        assert!(interrupts.due_at().is_none());
        assert!(!interrupts.shown(1, true, some));
        std::thread::sleep(Duration::from_millis(3));
        assert!(interrupts.is_due_by(Instant::now()));
        interrupts.raised();
        assert!(!interrupts.waits());
    }

    #[test]
    fn a_rule_that_holds_no_more_holds_nothing_up() {
        let long = Moderation {
            max_packets: 64,
            max_usecs: u32::MAX,
        };
        let mut interrupts = Interrupts::default();
        interrupts.hasten();
        assert!(!interrupts.shown(1, true, long) && !interrupts.is_due_by(Instant::now()));
        interrupts.hasten();
        assert!(interrupts.is_due_by(Instant::now()));
        assert_eq!(Moderation::of_sent(8).max_packets, 2);
    }

    #[test]
    fn no_time_is_at_once() {
        let frames = Moderation {
            max_packets: 64,
            max_usecs: 0,
        };
        assert!(Interrupts::default().shown(1, true, frames));
    }
}
