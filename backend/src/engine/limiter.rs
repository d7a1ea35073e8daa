//! How much of something may be done in a time: bytes, and operations.

use super::allowance::Allowance;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Short: what waits for the next one is late by so much.
const PERIOD: Duration = Duration::from_millis(10);

/// Who comes late for what was due has it still, up to this part of a second: a worker's sleep is not exact.
const LATENESS: u64 = 20;

/// What is allowed in a second, of which nothing is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes: Option<NonZeroU64>,
    pub operations: Option<NonZeroU64>,
    /// What may be had at once after a rest: as much as in so many seconds.
    pub burst_seconds: u32,
}

/// Holds something to [`Limits`].
#[derive(Debug)]
pub(crate) struct Limiter {
    bytes: Option<Allowance>,
    operations: Option<Allowance>,
    /// It has refused something.
    is_exhausted: bool,
}

impl Limiter {
    pub(crate) fn new(limits: Limits) -> Self {
        let now = Instant::now();
        let allowance = |limit: Option<NonZeroU64>| {
            let rate = limit?.get();
            let burst = rate.saturating_mul(limits.burst_seconds.into());
            let burst = burst.max(rate / LATENESS);
            Some(Allowance::new(rate, PERIOD, now).with_burst(burst))
        };
        Self {
            bytes: allowance(limits.bytes),
            operations: allowance(limits.operations),
            is_exhausted: false,
        }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Allowance> {
        self.bytes.iter_mut().chain(&mut self.operations)
    }

    /// Whether another operation may be begun now.
    pub(crate) fn admits(&mut self) -> bool {
        if self.bytes.is_none() && self.operations.is_none() {
            return true;
        }
        let now = Instant::now();
        // Each of them is told of the time.
        let admitted = self.all().fold(true, |all, one| all & one.admits(now));
        self.is_exhausted = !admitted;
        admitted
    }

    /// An operation of `bytes` was begun.
    pub(crate) fn spend(&mut self, bytes: usize) {
        if let Some(allowance) = &mut self.bytes {
            allowance.spend(bytes as u64);
        }
        if let Some(allowance) = &mut self.operations {
            allowance.spend(1);
        }
    }

    /// Nothing is waiting for the next operation any more.
    pub(crate) fn forget(&mut self) {
        self.is_exhausted = false;
    }

    /// When another operation may be begun, if not now.
    pub(crate) fn next(&self) -> Option<Instant> {
        let both = [&self.bytes, &self.operations].into_iter().flatten();
        self.is_exhausted
            .then(|| both.map(Allowance::next).min())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_none_is_none() {
        let limits = |bytes, operations| Limits {
            bytes: NonZeroU64::new(bytes),
            operations: NonZeroU64::new(operations),
            burst_seconds: 0,
        };
        let mut none = Limiter::new(limits(0, 0));
        for _ in 0..1000 {
            none.spend(usize::MAX / 2);
            assert!(none.admits() && none.next().is_none());
        }
        for limits in [limits(100_000, 0), limits(0, 100), limits(1 << 40, 100)] {
            let mut limiter = Limiter::new(limits);
            assert!(limiter.admits() && limiter.next().is_none());
            for _ in 0..10 {
                limiter.spend(1000);
            }
            assert!(!limiter.admits() && limiter.next().is_some(), "{limits:?}");
        }
    }
}
