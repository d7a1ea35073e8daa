//! What goes wrong on a simulated guest, when a test says so.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A point at which something can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A copy within one page is refused, as if the guest had revoked the grant.
    RevokedCopy,
    /// A copy call fails as a whole: dom0 has no memory.
    CopyCall,
    /// A ring is not mapped: dom0 has no memory.
    MapRing,
    /// A ring is not mapped, and it is not known why: the guest may have granted it so.
    DoubtfulMap,
    /// An interrupt is not raised.
    Interrupt,
    /// A range of addresses is not claimed: the hypervisor refuses it.
    Claim,
}

const POINTS: usize = Fault::Claim as usize + 1;

/// The faults of one guest. A fault that is ordered happens at the next passes of its point.
///
/// The process that serves the guest has a life as well: every write to what is shared with the guest, or with the
/// process that follows, is a step of it, and the thread that comes to the last one dies there as SIGKILL kills a
/// process: nothing more of it is carried out.
#[derive(Debug, Default)]
pub struct Faults {
    ordered: [AtomicU32; POINTS],
    steps: AtomicU64,
    /// The step that is not carried out; none if zero.
    last_step: AtomicU64,
}

impl Faults {
    /// Has `fault` happen the next `times` times, in place of what was ordered before.
    pub fn order(&self, fault: Fault, times: u32) {
        self.ordered[fault as usize].store(times, Ordering::SeqCst);
    }

    /// How often `fault` is still to happen.
    pub fn left(&self, fault: Fault) -> u32 {
        self.ordered[fault as usize].load(Ordering::SeqCst)
    }

    /// Whether `fault` happens now.
    pub(crate) fn strikes(&self, fault: Fault) -> bool {
        let ordered = &self.ordered[fault as usize];
        // On every copy's way, on which there is none as a rule.
        ordered.load(Ordering::Relaxed) > 0
            && ordered
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |times| {
                    times.checked_sub(1)
                })
                .is_ok()
    }

    /// Steps since [`Faults::die_at`].
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }

    /// The thread that comes to step `last`, counted from now on from one, dies there; none if that is zero.
    pub fn die_at(&self, last: u64) {
        self.last_step.store(last, Ordering::SeqCst);
        self.steps.store(0, Ordering::SeqCst);
    }

    /// Whether a thread has died since [`Faults::die_at`].
    pub fn has_died(&self) -> bool {
        let last = self.last_step.load(Ordering::SeqCst);
        last != 0 && self.steps() >= last
    }

    /// A step is about to be carried out.
    pub fn step(&self) {
        // First: once the last step is counted, whoever waits for the death may choose the next one's.
        let last = self.last_step.load(Ordering::SeqCst);
        let step = self.steps.fetch_add(1, Ordering::SeqCst) + 1;
        if step == last {
            loop {
                std::thread::park();
            }
        }
    }
}
