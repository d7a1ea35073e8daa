//! How much a guest may have in a time.

use std::time::{Duration, Instant};

/// A rate, held to over periods.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// What one nanosecond allows, in units of a billionth: how much may be had in a second.
    rate: u64,
    period: Duration,
    /// What may have been had before no more is, in billionths.
    room: u128,
    /// What was had and is not made up for yet, in billionths.
    used: u128,
    began: Instant,
}

const BILLION: u128 = 1_000_000_000;

impl Allowance {
    /// `rate` a second. What a period allows may be had at its beginning, and is not kept for the next one: whoever waits for that
    /// sleeps meanwhile.
    pub(crate) fn new(rate: u64, period: Duration, now: Instant) -> Self {
        Self {
            rate,
            period,
            room: u128::from(rate) * period.as_nanos(),
            used: 0,
            began: now,
        }
    }

    /// After a rest, so much may be had at once.
    pub(crate) fn with_burst(mut self, burst: u64) -> Self {
        self.room = self.room.max(u128::from(burst) * BILLION);
        self
    }

    /// Whether something may be had at `now`. What was too much of the last period counts in this one.
    pub(crate) fn admits(&mut self, now: Instant) -> bool {
        let rest = now.saturating_duration_since(self.began).as_nanos();
        let whole = rest - rest % self.period.as_nanos();
        if whole > 0 {
            let allowed = u128::from(self.rate).saturating_mul(whole);
            self.used = self.used.saturating_sub(allowed);
            let begun = u64::try_from(rest - whole).expect("less than a period");
            self.began = now - Duration::from_nanos(begun);
        }
        self.used < self.room
    }

    /// `count` was had.
    pub(crate) fn spend(&mut self, count: u64) {
        self.used = self.used.saturating_add(u128::from(count) * BILLION);
    }

    /// When the next period begins.
    pub(crate) fn next(&self) -> Instant {
        self.began + self.period
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(100);

    #[test]
    fn no_more_than_was_allowed_is_had_in_the_long_run() {
        let mut now = Instant::now();
        for (rate, each) in [
            (100_000, 64),
            (100_000, 4096),
            (100_000, 500_000),
            (150, 1),
            (3, 1),
        ] {
            for period in [PERIOD, PERIOD / 10] {
                let mut allowance = Allowance::new(rate, period, now);
                let mut had = 0;
                let end = now + Duration::from_secs(100);
                while now < end {
                    while allowance.admits(now) {
                        allowance.spend(each);
                        had += each;
                    }
                    assert!(!allowance.admits(now) && allowance.next() > now);
                    now = allowance.next();
                }
                let most = 100 * rate + rate / 10 + each;
                let least = (100 * rate - each).min(98 * rate);
                assert!((least..=most).contains(&had), "{rate} {each}: {had}");
            }
        }
    }

    #[test]
    fn what_was_not_had_is_not_kept() {
        let began = Instant::now();
        let mut allowance = Allowance::new(1000, PERIOD, began);
        let now = began + Duration::from_secs(3600);
        assert!(allowance.admits(now));
        allowance.spend(100);
        assert!(!allowance.admits(now));
    }

    #[test]
    fn a_burst_is_had_at_once_and_made_up_for() {
        let began = Instant::now();
        let mut allowance = Allowance::new(1000, PERIOD, began).with_burst(5000);
        let mut now = began;
        let mut had = 0;
        for (seconds, expected) in [(0, 5000), (1, 6000), (10, 11000)] {
            now = now.max(began + Duration::from_secs(seconds));
            while allowance.admits(now) {
                allowance.spend(10);
                had += 10;
            }
            assert_eq!(had, expected, "after {seconds} s");
        }
    }
}
