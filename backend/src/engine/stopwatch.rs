//! Measures stages now and then: reading the clock is dear on some machines.

use std::time::Instant;

/// One batch in so many is measured.
const SAMPLE: u64 = 16;

/// Runs for a batch that is measured, and stands for the others.
pub(crate) struct Stopwatch(Option<Instant>);

impl Stopwatch {
    /// `batches` counts them, and says whether this one is measured.
    pub(crate) fn start(batches: &mut u64) -> Self {
        *batches += 1;
        Self(batches.is_multiple_of(SAMPLE).then(Instant::now))
    }

    /// Adds the time since the last call to a stage, on behalf of the batches that are not measured too,
    /// and goes on.
    pub(crate) fn stop(&mut self, nanoseconds: &mut u64) {
        if let Some(began) = &mut self.0 {
            let now = Instant::now();
            let time = u64::try_from((now - *began).as_nanos()).unwrap_or(u64::MAX);
            *nanoseconds = nanoseconds.saturating_add(time.saturating_mul(SAMPLE));
            *began = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_batch_in_sixteen_stands_for_all() {
        let (mut batches, mut nanoseconds) = (0, 0);
        for _ in 0..SAMPLE {
            let mut stopwatch = Stopwatch::start(&mut batches);
            if stopwatch.0.is_some() {
                std::thread::sleep(Duration::from_millis(1));
            }
            stopwatch.stop(&mut nanoseconds);
        }
        assert_eq!(batches, SAMPLE);
        assert!(nanoseconds >= SAMPLE * 1_000_000, "{nanoseconds}");
    }
}
