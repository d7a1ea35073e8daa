//! How long requests are with a device, as its driver sees it but for the interrupt: from the available ring to the used one.
//!
//! A few of them are timed, since reading the clock is dear on some machines.

use super::request::{Completion, Request};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// One request in so many of a queue is timed, if none is already.
const SAMPLE: u32 = 16;

/// Counts of the requests that took up to 1, 2, 4 … 2^23 µs (8 s), and of those that took longer.
pub const LATENCY_BUCKETS: usize = 25;

/// The requests of a device that were timed, by how long they took.
#[derive(Debug, Default)]
pub struct Latencies {
    counts: [Cell<u64>; LATENCY_BUCKETS],
    /// Nanoseconds of all of them.
    total: Cell<u64>,
}

impl Latencies {
    /// See [`LATENCY_BUCKETS`].
    pub fn counts(&self) -> [u64; LATENCY_BUCKETS] {
        std::array::from_fn(|index| self.counts[index].get())
    }

    /// How long all that were timed took, together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total.get())
    }

    fn add(&self, took: Duration) {
        let count = &self.counts[bucket(took)];
        count.set(count.get() + 1);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.total.set(self.total.get().saturating_add(nanoseconds));
    }
}

/// The place of a request that took so long.
fn bucket(took: Duration) -> usize {
    let microseconds = took.as_nanos().div_ceil(1000);
    let bits = u128::BITS - microseconds.saturating_sub(1).leading_zeros();
    (bits as usize).min(LATENCY_BUCKETS - 1)
}

/// Times the requests of a queue.
pub(super) struct Timer {
    latencies: Rc<Latencies>,
    /// Requests until the next one that is timed.
    countdown: u32,
    /// The head of the one that is, and since when.
    timed: Option<(u16, Instant)>,
}

impl Timer {
    pub(super) fn new(latencies: Rc<Latencies>) -> Self {
        Self {
            latencies,
            countdown: 0,
            timed: None,
        }
    }

    /// The device takes `request`. One that brings nothing may wait for what the device has to tell, and one of an earlier
    /// process has waited for this one.
    pub(super) fn begin(&mut self, request: &Request) {
        if self.timed.is_some() || request.readable.is_empty() || request.is_repeated() {
            return;
        }
        if let Some(rest) = self.countdown.checked_sub(1) {
            self.countdown = rest;
            return;
        }
        self.countdown = SAMPLE - 1;
        self.timed = Some((request.head(), Instant::now()));
    }

    /// The device gives it back.
    pub(super) fn end(&mut self, completion: &Completion) {
        if let Some((_, began)) = self.timed.take_if(|(head, _)| *head == completion.head) {
            self.latencies.add(began.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::GuestAddress;

    fn request(head: u16) -> Request {
        let mut request = Request::new(head);
        let descriptor = Descriptor::new(GuestAddress(0x1000).0, 16, 0, 0);
        request.add(descriptor).unwrap();
        request
    }

    fn count(latencies: &Latencies) -> u64 {
        latencies.counts().iter().sum()
    }

    #[test]
    fn a_request_is_in_the_place_of_the_power_of_two_that_it_does_not_exceed() {
        for (nanoseconds, place) in [
            (0, 0),
            (1000, 0),
            (1001, 1),
            (2000, 1),
            (2001, 2),
            (4_000, 2),
            (1_000_000, 10),
            (8_388_608_000, 23),
            (8_388_608_001, 24),
            (u64::MAX, 24),
        ] {
            let took = Duration::from_nanos(nanoseconds);
            assert_eq!(bucket(took), place, "{nanoseconds}");
        }
    }

    #[test]
    fn one_request_in_sixteen_is_timed() {
        let latencies = Rc::default();
        let mut timer = Timer::new(Rc::clone(&latencies));
        for head in (0..8).cycle().take(33) {
            let request = request(head);
            timer.begin(&request);
            timer.end(&request.finish(0));
        }
        assert_eq!(count(&latencies), 3);
        assert!(latencies.total() > Duration::ZERO);
    }

    #[test]
    fn what_waits_for_the_device_and_what_was_taken_before_is_not_timed() {
        let latencies = Rc::default();
        let mut timer = Timer::new(Rc::clone(&latencies));
        let others = [Request::new(1), request(2).repeated()];
        for other in others {
            timer.begin(&other);
            timer.end(&other.finish(0));
        }
        assert_eq!(count(&latencies), 0);
        let (first, second) = (request(3), request(4));
        timer.begin(&first);
        timer.begin(&second);
        timer.end(&second.finish(0));
        assert_eq!(count(&latencies), 0);
        timer.end(&first.finish(0));
        assert_eq!(count(&latencies), 1);
    }
}
