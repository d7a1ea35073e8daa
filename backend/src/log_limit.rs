//! Bounds the log lines that a guest can cause.

use std::time::{Duration, Instant};

const LINES: u32 = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// Lets five lines a minute through.
#[derive(Debug)]
pub struct LogLimit {
    period_began: Instant,
    lines: u32,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self {
            period_began: Instant::now(),
            lines: 0,
        }
    }
}

impl LogLimit {
    /// Whether to write the next line.
    pub fn allow(&mut self) -> bool {
        if self.period_began.elapsed() >= PERIOD {
            *self = Self::default();
        }
        self.lines += 1;
        self.lines <= LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_past_the_limit_are_dropped_until_the_period_ends() {
        let mut limit = LogLimit::default();
        assert_eq!((0..100).filter(|_| limit.allow()).count(), LINES as usize);
        limit.period_began = Instant::now().checked_sub(PERIOD).unwrap();
        assert!(limit.allow());
    }
}
