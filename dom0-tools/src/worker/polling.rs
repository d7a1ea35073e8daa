//! When to go on looking for work, and when to sleep.
//!
//! Waking up costs more than most of a guest's requests: dom0 is scheduled, and the kernel goes through an
//! interrupt and a system call or two. So a worker that has just done something looks a while longer, as
//! long as that has paid lately.

use std::time::{Duration, Instant};
use xen_virtio_backend::tuning::SHORTEST_POLL;

/// How long to look: grown by sleeps that were too short to be worth it, shrunk by long ones.
#[derive(Debug)]
pub struct Polling {
    /// The longest time; zero to sleep at once, always.
    limit: Duration,
    window: Duration,
    last_work: Instant,
    looked: Duration,
}

impl Polling {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            last_work: now,
            looked: Duration::ZERO,
        }
    }

    /// Whether looking pays at present.
    pub fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// Something was done.
    pub fn worked(&mut self, now: Instant) {
        self.last_work = now;
    }

    /// Whether to look again before sleeping.
    pub fn goes_on(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_work) < self.window
    }

    /// Ends a look: work has come, or it is time to sleep.
    pub fn stopped(&mut self, now: Instant) {
        let looked = now.saturating_duration_since(self.last_work);
        self.looked += looked.min(self.window);
    }

    /// There was work again after sleeping for so long.
    pub fn slept(&mut self, time: Duration) {
        self.window = if time < self.limit {
            (2 * self.window).clamp(SHORTEST_POLL.min(self.limit), self.limit)
        } else {
            Some(self.window / 2)
                .filter(|window| *window >= SHORTEST_POLL)
                .unwrap_or_default()
        };
    }

    /// The time spent looking so far: what it costs.
    pub fn looked(&self) -> Duration {
        self.looked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(500);

    fn microseconds(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    /// The window after sleeps of these lengths.
    fn window_after(sleeps: impl IntoIterator<Item = u64>) -> Duration {
        let mut polling = Polling::new(LIMIT, Instant::now());
        for sleep in sleeps {
            polling.slept(microseconds(sleep));
        }
        polling.window
    }

    #[test]
    fn short_sleeps_grow_the_window_up_to_the_limit() {
        assert_eq!(window_after([]), Duration::ZERO);
        assert_eq!(window_after([100]), SHORTEST_POLL);
        assert_eq!(window_after([100, 100, 100]), 4 * SHORTEST_POLL);
        assert_eq!(window_after([499; 20]), LIMIT);
    }

    #[test]
    fn long_sleeps_shrink_it_to_nothing() {
        let grown = [100, 100, 100];
        assert_eq!(
            window_after(grown.into_iter().chain([500])),
            2 * SHORTEST_POLL
        );
        assert_eq!(
            window_after(grown.into_iter().chain([500; 3])),
            Duration::ZERO
        );
    }

    #[test]
    fn looking_ends_with_the_window_and_is_accounted_for() {
        let start = Instant::now();
        let mut polling = Polling::new(LIMIT, start);
        polling.slept(microseconds(1));
        polling.worked(start);
        assert!(polling.goes_on(start + microseconds(19)));
        assert!(!polling.goes_on(start + microseconds(20)));
        polling.stopped(start + microseconds(25));
        assert_eq!(polling.looked(), microseconds(20));
    }

    #[test]
    fn with_a_limit_of_zero_nothing_is_looked_for() {
        let start = Instant::now();
        let mut polling = Polling::new(Duration::ZERO, start);
        for sleep in [0, 1, 1000] {
            polling.slept(microseconds(sleep));
            polling.worked(start);
            assert!(!polling.goes_on(start));
        }
    }
}
