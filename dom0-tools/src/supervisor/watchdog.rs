//! systemd's watchdog, which replaces a service that stands still. Its workers serve on meanwhile.

use std::time::{Duration, Instant};

pub(super) struct Watchdog {
    every: Duration,
    due: Instant,
}

impl Watchdog {
    /// `None` if nobody watches (`WatchdogSec=` in the unit, `sd_watchdog_enabled(3)`).
    pub(super) fn from_environment() -> Option<Self> {
        sd_notify::watchdog_enabled().map(|limit| Self::new(limit, Instant::now()))
    }

    /// One that wants to hear of this process within each `limit`.
    fn new(limit: Duration, now: Instant) -> Self {
        Self {
            every: limit / 2,
            due: now,
        }
    }

    /// When it is to hear of this process next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Tells it that this process goes on, if that is due.
    pub(super) fn tell(&mut self) {
        if self.falls_due(Instant::now()) {
            // Who does not hear of it ends this process, which is what it is for.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }

    fn falls_due(&mut self, now: Instant) -> bool {
        let is_due = self.due <= now;
        if is_due {
            self.due = now + self.every;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_hears_twice_within_its_limit() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut watchdog = Watchdog::new(Duration::from_secs(30), start);
        let mut told = Vec::new();
        for second in 0..=60 {
            if watchdog.falls_due(after(second)) {
                told.push(second);
                assert_eq!(watchdog.due(), after(second + 15));
            }
        }
        assert_eq!(told, [0, 15, 30, 45, 60]);
    }
}
