//! The processor time that one guest may cost: a share of what passes.

use std::time::{Duration, Instant};

/// Unused time that is kept: a guest that was idle may work at full speed for this long.
const SAVED: Duration = Duration::from_millis(100);

/// A worker's processor time against its share.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Percent of one processor; all of it has no end.
    percent: u32,
    /// When the time that is accounted for began, and what had been used by then.
    began: Instant,
    used: Duration,
}

impl Budget {
    /// `percent` of one processor, from 1; 100 and more is no limit.
    /// What was `used` before `now` does not count.
    pub(crate) fn new(percent: u32, now: Instant, used: Duration) -> Self {
        Self {
            percent: percent.max(1),
            began: now,
            used,
        }
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.percent < 100
    }

    /// How long to rest, if `used`, the processor time used in all, is more than the share.
    pub(crate) fn throttle_delay(&mut self, now: Instant, used: Duration) -> Option<Duration> {
        let spent = used.saturating_sub(self.used);
        // The time that the share of which is what was spent.
        let wanted = spent * 100 / self.percent;
        let passed = now.saturating_duration_since(self.began) + SAVED;
        if wanted > passed {
            return Some(wanted - passed);
        }
        if passed - wanted > SAVED {
            // What is not used is not saved for ever.
            self.began = now;
            self.used = used;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_busy_worker_gets_its_share() {
        let began = Instant::now();
        let mut budget = Budget::new(20, began, Duration::ZERO);
        let (mut now, mut used) = (began, Duration::ZERO);
        while now < began + 10_000 * MS {
            // Always at work, a millisecond at a time.
            now += MS;
            used += MS;
            if let Some(rest) = budget.throttle_delay(now, used) {
                now += rest;
            }
        }
        let share = used.as_millis() * 100 / (now - began).as_millis();
        assert!((19..=22).contains(&share), "{share} %");
    }

    #[test]
    fn a_worker_that_was_idle_has_saved_no_more_than_a_little() {
        let began = Instant::now();
        let mut budget = Budget::new(10, began, Duration::ZERO);
        let now = began + 60_000 * MS;
        assert_eq!(budget.throttle_delay(now, MS), None);
        // A tenth of what is saved, on top of what the idle time left.
        assert_eq!(budget.throttle_delay(now, 11 * MS), None);
        assert_eq!(budget.throttle_delay(now, 16 * MS), Some(50 * MS));
    }

    #[test]
    fn a_whole_processor_is_no_limit() {
        assert!(!Budget::new(100, Instant::now(), MS).is_limited());
        assert!(Budget::new(99, Instant::now(), MS).is_limited());
    }
}
