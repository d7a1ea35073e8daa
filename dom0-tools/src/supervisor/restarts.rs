//! When a worker that has died may be started again: at once, unless it keeps dying, and then less and less often.

use std::time::{Duration, Instant};

/// Restarts at once, after a long time without any.
const BURST: u32 = 16;
/// What gives one of them back.
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest wait for a restart. It doubles from one interval, until there was none for as long as this.
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Restarts {
    left: u32,
    /// Since when there are that many.
    since: Instant,
    /// The wait for the next one when none is left.
    wait: Duration,
    last: Instant,
    count: u64,
}

impl Restarts {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            wait: INTERVAL,
            last: now,
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
        if self.last + LONGEST <= now {
            self.wait = INTERVAL;
        }
        self.last = now;
        self.count += 1;
        if self.left > 0 {
            self.left -= 1;
            return now;
        }
        // What was waited for saves nothing.
        self.since = now + self.wait;
        self.last = self.since;
        self.wait = (self.wait * 2).min(LONGEST);
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that kills each of its workers at once costs dom0 less and less.
    #[test]
    fn a_worker_that_keeps_dying_is_started_less_and_less_often() {
        let begin = Instant::now();
        let mut restarts = Restarts::new(begin);
        for _ in 0..BURST {
            assert_eq!(restarts.next(begin), begin);
        }
        let mut now = begin;
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            let at = restarts.next(now);
            assert_eq!(at - now, Duration::from_secs(seconds));
            now = at;
        }
        // A few that were saved are used at once; the wait is as long as before.
        now += 3 * INTERVAL;
        for _ in 0..3 {
            assert_eq!(restarts.next(now), now);
        }
        assert_eq!(restarts.next(now), now + LONGEST);
        assert_eq!(restarts.count(), u64::from(BURST) + 12);
        // A burst is saved before the wait is forgotten.
        now += LONGEST + BURST * INTERVAL;
        for _ in 0..BURST {
            assert_eq!(restarts.next(now), now);
        }
        assert_eq!(restarts.next(now), now + LONGEST);
        now += 3 * LONGEST;
        for _ in 0..BURST {
            assert_eq!(restarts.next(now), now);
        }
        assert_eq!(restarts.next(now), now + INTERVAL);
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
