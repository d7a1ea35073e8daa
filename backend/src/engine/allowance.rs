//! How much a guest may ask for in a time.

use std::time::{Duration, Instant};

/// What was not used of one is not kept for the next. Long enough that whoever waits for the next one sleeps most of the
/// time.
const PERIOD: Duration = Duration::from_millis(100);

/// Bytes that a guest may have in each period.
#[derive(Debug)]
pub(crate) struct Allowance {
    each: u64,
    used: u64,
    began: Instant,
}

impl Allowance {
    /// `bytes` a second.
    pub(crate) fn new(bytes: u64, now: Instant) -> Self {
        let periods = 1000 / u64::try_from(PERIOD.as_millis()).unwrap_or(u64::MAX);
        Self {
            each: bytes.div_ceil(periods),
            used: 0,
            began: now,
        }
    }

    /// Whether something may be had at `now`. What was too much of the last period counts in this one.
    pub(crate) fn admits(&mut self, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.began).as_nanos() / PERIOD.as_nanos();
        if let Ok(periods @ 1..) = u64::try_from(periods) {
            self.used = self.used.saturating_sub(self.each.saturating_mul(periods));
            self.began = now;
        }
        self.used < self.each
    }

    /// `bytes` were had.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    /// When the next period begins.
    pub(crate) fn next(&self) -> Instant {
        self.began + PERIOD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_was_allowed_is_had_in_the_long_run() {
        let mut now = Instant::now();
        for (each, least) in [(64, 990_000), (4096, 990_000), (500_000, 900_000)] {
            let mut allowance = Allowance::new(100_000, now);
            let mut had = 0;
            let end = now + Duration::from_secs(10);
            while now < end {
                while allowance.admits(now) {
                    allowance.spend(each);
                    had += each;
                }
                assert!(!allowance.admits(now) && allowance.next() > now);
                now = allowance.next();
            }
            assert!((least..=1_000_000 + each).contains(&had), "{each}: {had}");
        }
    }

    #[test]
    fn what_was_not_had_is_not_kept() {
        let began = Instant::now();
        let mut allowance = Allowance::new(1000, began);
        let now = began + Duration::from_secs(3600);
        assert!(allowance.admits(now));
        allowance.spend(100);
        assert!(!allowance.admits(now));
    }
}
