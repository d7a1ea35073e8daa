//! Whether a worker that shares its processor looks for work, or sleeps in place of looking.
//!
//! A worker that looks gives way now and then. If most of its time goes by so, others want the processor. Beside a computation it pays to sleep:
//! the kernel lets a worker run as soon as there is work, for it has not had its share yet, and who looks has to wait for
//! its turn. Among other workers it may not: each of them gives way soon, and a sleep costs two changes of task. So both are
//! tried, and what has carried out more requests is kept for a while.

use std::time::{Duration, Instant};
use xen_virtio_backend::tuning::{
    CONTENTION_KEPT, CONTENTION_TRIAL, CONTENTION_WINDOW, LONG_YIELD, WORTH_LOOKING,
};

/// What a worker does, and how that goes.
#[derive(Debug)]
pub(crate) enum Contention {
    /// It looks. Since then yields that took long have taken so long in all: a few do without anybody else in dom0, when Xen has
    /// another domain run.
    None { since: Instant, yielded: Duration },
    /// It looks, and what comes of that is measured.
    TryLooking(Sample),
    /// It sleeps, and what comes of that is measured beside the requests a second that looking brought.
    TrySleeping { sample: Sample, looking: f64 },
    /// What was better, until then.
    Kept { sleeps: bool, until: Instant },
}

/// When a trial began, and how many requests had been carried out by then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    began: Instant,
    requests: u64,
}

impl Sample {
    /// Requests a second, once the trial is over.
    fn rate(&self, now: Instant, requests: u64) -> Option<f64> {
        let time = now.saturating_duration_since(self.began);
        #[allow(clippy::cast_precision_loss)]
        let count = requests.saturating_sub(self.requests) as f64;
        (time >= CONTENTION_TRIAL).then(|| count / time.as_secs_f64())
    }
}

impl Contention {
    pub(crate) fn new(now: Instant) -> Self {
        let yielded = Duration::ZERO;
        Self::None {
            since: now,
            yielded,
        }
    }

    /// Whether the worker is to sleep in place of looking.
    pub(crate) fn sleeps(&self) -> bool {
        match self {
            Self::None { .. } | Self::TryLooking(_) => false,
            Self::TrySleeping { .. } => true,
            Self::Kept { sleeps, .. } => *sleeps,
        }
    }

    /// A yield took so long, and was over at `now`; `requests` were carried out in all.
    pub(crate) fn gave_way(&mut self, took: Duration, now: Instant, requests: u64) {
        if let Self::None { yielded, .. } = self
            && took >= LONG_YIELD
        {
            *yielded += took;
        }
        self.passed(now, requests);
    }

    /// The time is `now`, and `requests` were carried out in all.
    pub(crate) fn passed(&mut self, now: Instant, requests: u64) {
        match self {
            Self::None { since, yielded } => {
                let time = now.saturating_duration_since(*since);
                if time >= CONTENTION_WINDOW {
                    let began = now;
                    *self = match 2 * *yielded >= time {
                        true => Self::TryLooking(Sample { began, requests }),
                        false => Self::new(now),
                    };
                }
            }
            Self::TryLooking(sample) => {
                if let Some(looking) = sample.rate(now, requests) {
                    let began = now;
                    let sample = Sample { began, requests };
                    *self = Self::TrySleeping { sample, looking };
                }
            }
            Self::TrySleeping { sample, looking } => {
                if let Some(sleeping) = sample.rate(now, requests) {
                    // Where both come to the same, others have the processor.
                    let sleeps = *looking <= sleeping * WORTH_LOOKING;
                    let until = now + CONTENTION_KEPT;
                    *self = Self::Kept { sleeps, until };
                }
            }
            Self::Kept { until, .. } if now < *until => {}
            Self::Kept { .. } => *self = Self::new(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::from_micros(2);

    /// One that has found that others want the processor, as soon as it could; and when.
    fn contended(requests: u64) -> (Contention, Instant) {
        let start = Instant::now();
        let mut contention = Contention::new(start);
        let now = start + CONTENTION_WINDOW;
        contention.gave_way(CONTENTION_WINDOW / 2, now, requests);
        assert!(matches!(contention, Contention::TryLooking(_)));
        (contention, now)
    }

    /// What is kept after so many requests in the trial of looking, and so many in that of sleeping; and when.
    fn kept(looking: u64, sleeping: u64) -> (Contention, Instant) {
        let (mut contention, start) = contended(1000);
        assert!(!contention.sleeps());
        let asleep = start + CONTENTION_TRIAL;
        contention.passed(asleep - AT_ONCE, 1000);
        assert!(!contention.sleeps());
        contention.passed(asleep, 1000 + looking);
        assert!(contention.sleeps());
        let end = asleep + CONTENTION_TRIAL;
        contention.passed(end - AT_ONCE, 1000 + looking);
        assert!(matches!(contention, Contention::TrySleeping { .. }));
        contention.passed(end, 1000 + looking + sleeping);
        (contention, end)
    }

    #[test]
    fn what_has_brought_more_is_kept_for_a_while() {
        for (looking, sleeping, sleeps) in [
            (0, 0, true),
            (40, 40, true),
            (40, 30, false),
            (1, 0, false),
            (30, 40, true),
        ] {
            let (mut contention, now) = kept(looking, sleeping);
            assert_eq!(contention.sleeps(), sleeps, "{looking}, {sleeping}");
            let later = now + CONTENTION_KEPT;
            contention.gave_way(LONG_YIELD, later - AT_ONCE, 2000);
            assert_eq!(contention.sleeps(), sleeps, "{looking}, {sleeping}");
            contention.passed(later, 2000);
            assert!(!contention.sleeps());
        }
    }

    /// A trial may be over long before anybody looks, and a device that is taken away takes its count along.
    #[test]
    fn rates_count_and_not_requests() {
        let (mut contention, start) = contended(2000);
        let asleep = start + 4 * CONTENTION_TRIAL;
        contention.passed(asleep, 2100);
        contention.passed(asleep + CONTENTION_TRIAL, 2150);
        assert!(contention.sleeps());
        let (mut contention, now) = contended(2000);
        contention.passed(now + CONTENTION_TRIAL, 10);
        assert!(contention.sleeps());
    }

    /// Whether a worker that yields for these times, one after the other, finds that others want the processor.
    fn finds_others(yields: impl IntoIterator<Item = Duration>) -> bool {
        let mut now = Instant::now();
        let mut contention = Contention::new(now);
        yields.into_iter().any(|took| {
            now += took;
            contention.gave_way(took, now, 0);
            matches!(contention, Contention::TryLooking(_))
        })
    }

    #[test]
    fn a_worker_that_yields_most_of_its_time_for_long_shares_its_processor() {
        assert!(finds_others([LONG_YIELD; 100]));
        assert!(!finds_others([LONG_YIELD - AT_ONCE; 1000]));
        // Now and then Xen has another domain run.
        let seldom = [LONG_YIELD, LONG_YIELD / 2, LONG_YIELD / 2, LONG_YIELD / 2];
        assert!(!finds_others(seldom.into_iter().cycle().take(1000)));
    }
}
