//! Results that are held back for a moment, to be delivered together.

use crate::tuning::{BATCH, HELD_STEPS};

/// Fewer requests than these nobody waits for together.
pub(super) const FEW: usize = 4;

/// How long results are held back, for more to be delivered with.
#[derive(Debug, Default)]
pub(super) struct Holding {
    results: usize,
    steps: u32,
}

impl Holding {
    /// A step in which there are `results`, and as many as `expected` are to come. True if they are held back.
    pub(super) fn holds(&mut self, results: usize, expected: usize) -> bool {
        if results == 0 || expected < FEW || results >= expected.min(BATCH) {
            *self = Self::default();
            return false;
        }
        if results != self.results {
            (self.results, self.steps) = (results, 0);
        }
        self.steps += 1;
        self.steps <= HELD_STEPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_wait_for_as_many_as_are_to_come_and_not_for_long() {
        let mut holding = Holding::default();
        assert!(!holding.holds(0, 16) && !holding.holds(1, FEW - 1));
        for results in 1..8 {
            assert!(holding.holds(results, 16 - results), "{results}");
        }
        assert!(!holding.holds(8, 8));
        assert!(!holding.holds(BATCH, 100));
        let held = (0..2 * HELD_STEPS).filter(|_| holding.holds(3, 9));
        assert!(u32::try_from(held.count()).unwrap() >= HELD_STEPS);
        assert!(!holding.holds(3, 9));
    }
}
