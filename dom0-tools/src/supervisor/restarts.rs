//! When a worker that has died may be started again: at once, unless it keeps dying.

use std::time::{Duration, Instant};

/// Restarts at once, after a long time without any.
const BURST: u32 = 16;
/// What gives one of them back.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Restarts {
    left: u32,
    /// Since when there are that many.
    since: Instant,
    count: u64,
}

impl Restarts {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            count: 0,
        }
    }

    /// How often so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// When the next may be, which is thereby used.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        while self.left < BURST && self.since + INTERVAL <= now {
            self.left += 1;
            self.since += INTERVAL;
        }
        if self.left == BURST {
            self.since = now;
        }
        self.count += 1;
        if self.left > 0 {
            self.left -= 1;
            return now;
        }
        self.since += INTERVAL;
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_keeps_dying_is_started_once_a_second() {
        let begin = Instant::now();
        let mut restarts = Restarts::new(begin);
        for _ in 0..BURST {
            assert_eq!(restarts.next(begin), begin);
        }
        let mut now = begin;
        for second in 1..4 {
            now = restarts.next(now);
            assert_eq!(now, begin + second * INTERVAL);
        }
        now += 3 * INTERVAL;
        for _ in 0..3 {
            assert_eq!(restarts.next(now), now);
        }
        assert_eq!(restarts.next(now), now + INTERVAL);
        assert_eq!(restarts.count(), u64::from(BURST) + 7);
    }

    #[test]
    fn rest_gives_back_no_more_than_there_were() {
        let begin = Instant::now();
        let mut restarts = Restarts::new(begin);
        let later = begin + 1000 * INTERVAL;
        for _ in 0..BURST {
            assert_eq!(restarts.next(later), later);
        }
        assert!(restarts.next(later) > later);
    }
}
