//! Whether to wait for what an interrupt handler does: it reads why it was called, and acknowledges that (virtio 1.3, 4.2.2.2).
//!
//! Its accesses are certain, and the guest does nothing of what it was interrupted for without their answers. Were the next
//! requests carried out meanwhile, guest and device would wait for each other in turn. But a guest whose processor has
//! another one's vCPU may take long to come, and who waits for it has dom0's processor to itself.

use std::time::Duration;
use xen_virtio_backend::tuning::ACCESSES_PER_WAIT;

/// What comes next of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Status,
    Acknowledgement,
}

/// How waiting has paid lately.
#[derive(Debug, Default)]
struct Patience {
    /// Waits in a row that were in vain.
    misses: u32,
    /// As many from now on, the last of them is waited for.
    pass: u32,
}

impl Patience {
    fn ended(&mut self, came: bool) {
        if came {
            *self = Self::default();
            return;
        }
        self.misses = (self.misses + 1).min(ACCESSES_PER_WAIT.ilog2());
        self.pass = 1 << self.misses;
    }

    fn pays(&mut self) -> bool {
        self.pass = self.pass.saturating_sub(1);
        self.pass == 0
    }
}

/// The wait for a handler's next access.
#[derive(Debug, Default)]
pub(super) struct HandlerWait {
    /// Nothing, if no handler is to be waited for.
    next: Option<Access>,
    status: Patience,
    acknowledgement: Patience,
    total: Duration,
}

impl HandlerWait {
    fn patience(&mut self, access: Access) -> &mut Patience {
        match access {
            Access::Status => &mut self.status,
            Access::Acknowledgement => &mut self.acknowledgement,
        }
    }

    /// A handler comes to this access next.
    pub(super) fn expect(&mut self, access: Access) {
        self.next = self.patience(access).pays().then_some(access);
    }

    /// What is to be waited for.
    pub(super) fn next(&self) -> Option<Access> {
        self.next
    }

    /// The access was waited for, for this time, and came or did not.
    pub(super) fn waited(&mut self, access: Access, came: bool, time: Duration) {
        self.total += time;
        self.patience(access).ended(came);
        if !came {
            self.next = None;
        }
    }

    /// The time spent waiting so far.
    pub(super) fn total(&self) -> Duration {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_MOMENT: Duration = Duration::from_micros(200);

    /// Which of `count` handlers are waited for, of a guest whose handlers come, or do not.
    fn waits(wait: &mut HandlerWait, count: u32, come: bool) -> Vec<u32> {
        let mut waited = Vec::new();
        for number in 0..count {
            wait.expect(Access::Status);
            if let Some(access) = wait.next() {
                waited.push(number);
                wait.waited(access, come, A_MOMENT);
            }
        }
        waited
    }

    #[test]
    fn handlers_that_come_are_waited_for_always() {
        let mut wait = HandlerWait::default();
        assert_eq!(waits(&mut wait, 4, true), [0, 1, 2, 3]);
        assert_eq!(wait.total(), 4 * A_MOMENT);
    }

    #[test]
    fn those_that_do_not_come_are_waited_for_ever_less_often() {
        let waited = waits(&mut HandlerWait::default(), 300, false);
        assert_eq!(waited[..5], [0, 2, 6, 14, 30]);
        let most = waited.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert_eq!(most, Some(ACCESSES_PER_WAIT));
    }

    #[test]
    fn one_that_comes_has_all_waited_for_again() {
        let mut wait = HandlerWait::default();
        assert_eq!(waits(&mut wait, 3, false), [0, 2]);
        let waited = waits(&mut wait, 10, true);
        assert_eq!(waited, [3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn an_acknowledgement_that_is_late_says_nothing_of_the_next_handler() {
        let mut wait = HandlerWait::default();
        wait.expect(Access::Acknowledgement);
        wait.waited(Access::Acknowledgement, false, A_MOMENT);
        assert_eq!(wait.next(), None);
        wait.expect(Access::Status);
        assert_eq!(wait.next(), Some(Access::Status));
        wait.expect(Access::Acknowledgement);
        assert_eq!(wait.next(), None);
    }
}
