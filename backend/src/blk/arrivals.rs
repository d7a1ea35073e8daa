//! When requests that are available are taken: at once, or together with those that are about to come.
//!
//! A driver that has many requests under way makes them available one by one. Taken one by one they would each
//! cost a copy call, a call to the disk and an interrupt, and the driver would spend its time in interrupt
//! handlers. A driver that has one never waits.

/// As many are always worth taking: the driver prepares the next ones meanwhile.
const ENOUGH: usize = super::BATCH / 2;
/// As much data is always worth taking: calls and interrupts cost little beside it.
const ENOUGH_BYTES: u64 = 4096 * ENOUGH as u64;
/// Steps without another request after which no more is expected for now: some ten microseconds.
const PATIENCE: u32 = 512;

/// What has been seen of a driver's habits.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// As many are waited for.
    wanted: usize,
    /// The most requests that the driver had with us, available or under way, since the last delivery.
    most: usize,
    /// What was available at the last step, and for how many steps that has not changed.
    available: usize,
    unchanged: u32,
}

impl Arrivals {
    pub(super) fn new() -> Self {
        Self {
            wanted: 1,
            most: 0,
            available: 0,
            unchanged: 0,
        }
    }

    /// A step in which `available` requests wait in the queues, and `under_way` have been taken. True if
    /// those that wait are to be taken.
    pub(super) fn step(&mut self, available: usize, under_way: usize) -> bool {
        self.most = self.most.max(available + under_way);
        if self.available != available {
            self.available = available;
            self.unchanged = 0;
        }
        if available == 0 || available >= self.wanted {
            return available > 0;
        }
        self.unchanged += 1;
        let stalled = self.unchanged > PATIENCE;
        if stalled {
            self.wanted = self.wanted.div_ceil(2);
        }
        stalled
    }

    /// The driver was given `count` requests back, which moved `bytes` in all.
    pub(super) fn delivered(&mut self, count: usize, bytes: u64) {
        // Two thirds of what the driver has with us: it is to have something to do meanwhile.
        let is_fair = |wanted: usize| 3 * wanted <= 2 * self.most;
        // As many times the mean size.
        let is_little = |wanted: usize| wanted as u64 * bytes <= ENOUGH_BYTES * count as u64;
        let next = self.wanted + 1;
        if next <= ENOUGH && is_fair(next) && is_little(next) {
            self.wanted = next;
        } else if self.wanted > 1 && !(is_fair(self.wanted) && is_little(self.wanted)) {
            self.wanted -= 1;
        }
        self.most = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::BATCH;

    /// How many of a driver's requests are taken at a time, in the end. It keeps `depth` of them with us, and
    /// makes two available in the time that one takes us, or one with `slow`.
    fn batches(depth: usize, slow: bool) -> Vec<usize> {
        let mut arrivals = Arrivals::new();
        let mut batches = Vec::new();
        let (mut available, mut batch, mut left) = (0, 0, 0);
        for step in 0..4000 {
            if available + batch < depth && (!slow || step % 2 == 0) {
                available += 1;
            }
            if batch > 0 {
                arrivals.step(available, batch);
                left -= 1;
                if left == 0 {
                    arrivals.delivered(batch, batch as u64 * 4096);
                    batch = 0;
                }
            } else if arrivals.step(available, 0) {
                batch = available.min(BATCH);
                left = 2 * batch + 4;
                available -= batch;
                batches.push(batch);
            }
        }
        batches.split_off(batches.len() - 20)
    }

    #[test]
    fn one_request_never_waits() {
        let mut arrivals = Arrivals::new();
        for _ in 0..10 {
            assert!(!arrivals.step(0, 0));
            assert!(arrivals.step(1, 0));
            assert!(!arrivals.step(0, 1));
            arrivals.delivered(1, 4096);
        }
    }

    #[test]
    fn many_that_come_one_by_one_are_taken_together() {
        for (depth, slow, sizes) in [
            (1, false, 1..=1),
            (2, false, 1..=2),
            (4, false, 2..=4),
            (16, false, 8..=9),
            (16, true, 7..=9),
            (64, false, 8..=16),
        ] {
            let batches = batches(depth, slow);
            assert!(
                batches.iter().all(|batch| sizes.contains(batch)),
                "{depth}, {slow}: {batches:?}"
            );
        }
    }

    #[test]
    fn large_requests_are_taken_as_they_come() {
        for (bytes, waits) in [(4096, true), (16384, true), (65536, false)] {
            let mut arrivals = Arrivals::new();
            for _ in 0..100 {
                arrivals.step(0, 16);
                arrivals.delivered(16, 16 * bytes);
            }
            assert_eq!(!arrivals.step(1, 0), waits, "{bytes} bytes");
        }
    }

    #[test]
    fn what_does_not_come_is_not_waited_for_long() {
        let mut arrivals = Arrivals::new();
        for _ in 0..100 {
            arrivals.step(0, 16);
            arrivals.delivered(16, 16 * 4096);
        }
        let waited = [(); 6].map(|()| {
            let steps = (0..).take_while(|_| !arrivals.step(1, 0)).count();
            arrivals.step(0, 1);
            arrivals.delivered(1, 4096);
            steps
        });
        let patience = PATIENCE as usize;
        assert_eq!(waited, [patience, patience, 0, 0, 0, 0]);
    }
}
