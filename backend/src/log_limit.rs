//! Bounds the log lines that a guest can cause.

use std::time::{Duration, Instant};

const LINES: u32 = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// Lets so many lines a minute through: five, unless it is told otherwise.
#[derive(Debug)]
pub struct LogLimit {
    limit: u32,
    period_began: Instant,
    lines: u32,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new(LINES)
    }
}

impl LogLimit {
    /// Lets `limit` lines a minute through.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            period_began: Instant::now(),
            lines: 0,
        }
    }

    /// Whether to write the next line.
    pub fn allow(&mut self) -> bool {
        if self.period_began.elapsed() >= PERIOD {
            *self = Self::new(self.limit);
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= self.limit
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
