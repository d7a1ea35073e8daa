//! Whether others want the processor on which a worker looks for work.
//!
//! A worker that looks gives way now and then. If that takes long, somebody else computes there. From then on it sleeps in place
//! of looking, and the kernel lets it run as soon as there is work: who sleeps has not had its share yet, and
//! who looks has to wait for its turn. Some time later it tries again.

use std::time::{Duration, Instant};
use xen_virtio_backend::tuning::{LONG_YIELD, LONGEST_CONTENTION, SHORTEST_CONTENTION};

/// What giving way has shown.
#[derive(Debug, Default)]
pub(crate) struct Contention {
    /// Until when the worker sleeps in place of looking.
    until: Option<Instant>,
    /// For how long it did so the last time, and when that ended.
    last: Option<(Duration, Instant)>,
}

impl Contention {
    /// Whether the processor is to be left to others.
    pub(crate) fn holds(&self) -> bool {
        self.until.is_some()
    }

    /// The worker gave way at `before`, and went on at `after`.
    pub(crate) fn gave_way(&mut self, before: Instant, after: Instant) {
        if after.saturating_duration_since(before) < LONG_YIELD {
            return;
        }
        let spell = match self.last {
            // Soon after the last time: whoever it was is still there.
            Some((spell, ended)) if before < ended + LONGEST_CONTENTION => {
                (2 * spell).min(LONGEST_CONTENTION)
            }
            _ => SHORTEST_CONTENTION,
        };
        let until = after + spell;
        self.until = Some(until);
        self.last = Some((spell, until));
    }

    /// The time is `now`: it may be over.
    pub(crate) fn passed(&mut self, now: Instant) {
        self.until = self.until.filter(|until| now < *until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::from_micros(2);

    #[test]
    fn a_yield_that_takes_long_has_the_worker_sleep_for_a_while() {
        let mut contention = Contention::default();
        let start = Instant::now();
        contention.gave_way(start, start + AT_ONCE);
        assert!(!contention.holds());
        let now = start + LONG_YIELD;
        contention.gave_way(start, now);
        assert!(contention.holds());
        contention.passed(now + SHORTEST_CONTENTION - AT_ONCE);
        assert!(contention.holds());
        contention.passed(now + SHORTEST_CONTENTION);
        assert!(!contention.holds());
    }

    /// For how long the worker sleeps each time, of `count`, that others want the processor, when it has looked so long before.
    fn spells(count: usize, pause: Duration) -> Vec<Duration> {
        let mut contention = Contention::default();
        let mut now = Instant::now();
        let mut spell = || {
            let began = now + LONG_YIELD;
            contention.gave_way(now, began);
            let until = contention.until.take().unwrap();
            now = until + pause;
            until - began
        };
        (0..count).map(|_| spell()).collect()
    }

    #[test]
    fn the_more_often_in_a_row_the_longer() {
        let spells = spells(20, Duration::ZERO);
        assert_eq!(spells[..2], [SHORTEST_CONTENTION, 2 * SHORTEST_CONTENTION]);
        assert_eq!(spells[19], LONGEST_CONTENTION);
    }

    #[test]
    fn it_begins_anew_after_a_while_without() {
        let spells = spells(20, LONGEST_CONTENTION);
        assert_eq!(spells[19], SHORTEST_CONTENTION);
    }
}
