//! When requests that are available are taken: at once, or together with those that are about to come.
//!
//! A driver that has many requests under way makes them available one by one. Taken one by one they would each
//! cost a copy call, a call to the disk and an interrupt, and the driver would spend its time in interrupt
//! handlers. A driver that has one never waits.

use crate::tuning::{BATCH, MEMORY, PATIENCE, SMALL_REQUEST, SMALLEST_BATCH};
use xen_virtio_guest_mapping::AddressMode;

/// What has been seen of a driver's habits.
#[derive(Debug, Default)]
pub(crate) struct Coalescer {
    /// As many are waited for, if any.
    wanted: usize,
    /// The most requests that the driver had with us, available or under way: since the last delivery, in
    /// this period, and in the one before. What it holds itself, ended and not handled, is not seen.
    seen: usize,
    most: usize,
    earlier: usize,
    /// Deliveries in this period.
    deliveries: u32,
    /// What was available at the last step, and for how many steps that has not changed.
    available: usize,
    unchanged: u32,
}

impl Coalescer {
    /// A step in which `available` requests wait in the queues, and `under_way` have been taken. True if
    /// those that wait are to be taken.
    pub(crate) fn step(&mut self, available: usize, under_way: usize) -> bool {
        self.seen = self.seen.max(available + under_way);
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
    pub(crate) fn delivered(&mut self, count: usize, bytes: u64) {
        self.most = self.most.max(self.seen);
        let limit = if bytes <= SMALL_REQUEST * count as u64 {
            self.half().min(BATCH)
        } else {
            0
        };
        if self.wanted > limit {
            self.wanted -= 1;
        } else if self.wanted < limit.min(self.seen) {
            self.wanted += 1;
        }
        self.seen = 0;
        self.deliveries += 1;
        if self.deliveries == MEMORY {
            self.deliveries = 0;
            self.earlier = std::mem::take(&mut self.most);
        }
    }

    /// Half of what the driver has with us when it has most: it is to have something to do meanwhile.
    fn half(&self) -> usize {
        self.most.max(self.earlier) / 2
    }

    /// How many are taken at once. Copies by grant take longer than what the driver does for a request; so
    /// one half is copied while the driver handles the other and prepares it anew.
    pub(crate) fn batch(&self, mode: AddressMode) -> usize {
        match mode {
            AddressMode::Grants => self.half().clamp(SMALLEST_BATCH, BATCH),
            AddressMode::Frames => BATCH,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of a driver's requests are taken at a time, in the end. It keeps `depth` of them with us, and
    /// makes two available in the time that one takes us, or one with `slow`.
    fn batches(depth: usize, slow: bool) -> Vec<usize> {
        let mut coalescer = Coalescer::default();
        let mut batches = Vec::new();
        let (mut available, mut batch, mut left) = (0, 0, 0);
        for step in 0..4000 {
            if available + batch < depth && (!slow || step % 2 == 0) {
                available += 1;
            }
            if batch > 0 {
                coalescer.step(available, batch);
                left -= 1;
                if left == 0 {
                    coalescer.delivered(batch, batch as u64 * 4096);
                    batch = 0;
                }
            } else if coalescer.step(available, 0) {
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
        let mut coalescer = Coalescer::default();
        for _ in 0..10 {
            assert!(!coalescer.step(0, 0));
            assert!(coalescer.step(1, 0));
            assert!(!coalescer.step(0, 1));
            coalescer.delivered(1, 4096);
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
            (64, false, 31..=32),
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
            let mut coalescer = Coalescer::default();
            for _ in 0..100 {
                coalescer.step(0, 16);
                coalescer.delivered(16, 16 * bytes);
            }
            assert_eq!(!coalescer.step(1, 0), waits, "{bytes} bytes");
        }
    }

    #[test]
    fn what_does_not_come_is_not_waited_for_long() {
        let mut coalescer = Coalescer::default();
        for _ in 0..100 {
            coalescer.step(0, 16);
            coalescer.delivered(16, 16 * 4096);
        }
        let waited = [(); 6].map(|()| {
            let steps = (0..).take_while(|_| !coalescer.step(1, 0)).count();
            coalescer.step(0, 1);
            coalescer.delivered(1, 4096);
            steps
        });
        let patience = PATIENCE as usize;
        assert_eq!(waited, [patience, patience, patience, 0, 0, 0]);
    }

    #[test]
    fn half_is_copied_by_grant_at_a_time() {
        for (depth, batch) in [(1, 8), (16, 8), (24, 12), (64, 32), (500, 32)] {
            let mut coalescer = Coalescer::default();
            coalescer.step(0, depth);
            coalescer.delivered(depth, depth as u64 * 4096);
            assert_eq!(coalescer.batch(AddressMode::Grants), batch, "{depth}");
            assert_eq!(coalescer.batch(AddressMode::Frames), BATCH, "{depth}");
        }
    }

    #[test]
    fn a_driver_that_handles_much_itself_is_remembered_for_its_most() {
        let mut coalescer = Coalescer::default();
        coalescer.step(0, 64);
        for _ in 0..100 {
            coalescer.step(0, 40);
            coalescer.delivered(16, 16 * 4096);
        }
        assert!(!coalescer.step(31, 0));
        assert!(coalescer.step(32, 0));
        // It has become another.
        for _ in 0..3 * MEMORY {
            coalescer.step(1, 0);
            coalescer.delivered(1, 4096);
        }
        assert!(coalescer.step(1, 0));
    }
}
