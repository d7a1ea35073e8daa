//! What dom0 lacks at the moment, so that a device waits: memory, or a call that works. The driver did nothing wrong, and
//! is told nothing; it sees a pause.

use crate::log_limit::LogLimit;
use crate::tuning::{FIRST_WAIT, LONGEST_WAIT};
use std::error::Error;
use std::time::{Duration, Instant};

/// What a device waits for, if it does.
#[derive(Debug, Default)]
pub struct Shortage {
    now: Option<Lack>,
    /// How long it is no news.
    patience: Duration,
    log_limit: LogLimit,
}

#[derive(Debug)]
struct Lack {
    what: String,
    since: Instant,
    try_at: Instant,
    wait: Duration,
    logged: bool,
}

impl Shortage {
    /// One of which nothing is logged before it has lasted for `patience`: a moment of it is usual.
    pub fn patient(patience: Duration) -> Self {
        Self {
            patience,
            ..Self::default()
        }
    }

    /// `doing` failed by no fault of the driver's, and is to be tried again.
    pub fn note(&mut self, doing: &str, error: &dyn Error, now: Instant) {
        let what = format!("{doing} failed for want of something in dom0: {error}");
        let lack = match &mut self.now {
            Some(lack) => {
                lack.what = what;
                if lack.try_at > now {
                    // Others of the same try fail with it.
                    return;
                }
                lack.wait = (lack.wait * 2).min(LONGEST_WAIT);
                lack.try_at = now + lack.wait;
                lack
            }
            none => none.insert(Lack {
                what,
                since: now,
                try_at: now + FIRST_WAIT,
                wait: FIRST_WAIT,
                logged: false,
            }),
        };
        let is_news = !lack.logged && now.saturating_duration_since(lack.since) >= self.patience;
        if is_news && self.log_limit.allow() {
            lack.logged = true;
            tracing::warn!(
                "{}; it is tried again until it works, and the guest waits",
                lack.what
            );
        }
    }

    /// What was lacking is there.
    pub fn end(&mut self) {
        if let Some(lack) = self.now.take()
            && lack.logged
            && self.log_limit.allow()
        {
            tracing::info!(
                "dom0 had what was lacking after {} ms",
                lack.since.elapsed().as_millis()
            );
        }
    }

    /// There is nothing to be tried again any more.
    pub fn forget(&mut self) {
        self.now = None;
    }

    /// Whether to wait still. Without a shortage this costs nothing.
    pub fn holds(&self) -> bool {
        self.try_at().is_some_and(|at| at > Instant::now())
    }

    /// When to try again, if there is something to try.
    pub fn try_at(&self) -> Option<Instant> {
        self.now.as_ref().map(|lack| lack.try_at)
    }

    /// For whoever looks after dom0.
    pub fn warning(&self) -> Option<String> {
        let lack = self.now.as_ref()?;
        Some(format!(
            "waits for dom0 since {} s: {}",
            lack.since.elapsed().as_secs(),
            lack.what
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_come_less_and_less_often_until_one_works() {
        let error = std::io::Error::from_raw_os_error(libc::ENOMEM);
        let mut shortage = Shortage::default();
        let mut now = Instant::now();
        for milliseconds in [5, 10, 20, 40, 80, 160, 320, 500, 500] {
            for _ in 0..3 {
                shortage.note("copying", &error, now);
            }
            let at = shortage.try_at().unwrap();
            assert_eq!(at - now, Duration::from_millis(milliseconds));
            now = at;
        }
        assert!(shortage.holds());
        let warning = shortage.warning().unwrap();
        assert!(
            warning.contains("copying failed") && warning.contains("memory"),
            "{warning}"
        );
        shortage.end();
        assert_eq!((shortage.holds(), shortage.warning()), (false, None));
    }

    #[test]
    fn what_lasts_for_a_moment_only_is_no_news() {
        let error = std::io::Error::from_raw_os_error(libc::EAGAIN);
        let mut shortage = Shortage::patient(Duration::from_millis(100));
        let began = Instant::now();
        for (milliseconds, logged) in [(0, false), (50, false), (120, true)] {
            shortage.note(
                "taking",
                &error,
                began + Duration::from_millis(milliseconds),
            );
            assert_eq!(shortage.now.as_ref().unwrap().logged, logged);
        }
    }
}
