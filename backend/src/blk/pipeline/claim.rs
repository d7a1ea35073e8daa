//! A disk that an earlier process has had is taken before anything is begun: its transfers may be under way still.

use crate::shortage::Shortage;
use std::error::Error;
use std::time::{Duration, Instant};

/// Takes the disk from whoever has had it before, or says that transfers of that one are under way still.
pub type Claim = Box<dyn FnMut() -> Result<(), Box<dyn Error>>>;

/// How long the kernel may take, as a rule, to let go of what a killed process had open.
const USUAL_RELEASE: Duration = Duration::from_secs(1);

/// What is still to be done to have the disk.
pub(super) struct DiskClaim {
    claim: Option<Claim>,
    /// The claim that failed.
    shortage: Shortage,
}

impl Default for DiskClaim {
    fn default() -> Self {
        Self {
            claim: None,
            shortage: Shortage::patient(USUAL_RELEASE),
        }
    }
}

impl DiskClaim {
    /// The disk is to be taken by `claim` before anything is begun.
    pub(super) fn first(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }

    pub(super) fn is_pending(&self) -> bool {
        self.claim.is_some()
    }

    pub(super) fn forget(&mut self) {
        self.claim = None;
        self.shortage.forget();
    }

    /// Takes the disk, if that is still to be done. True if it has just been taken.
    pub(super) fn take(&mut self) -> bool {
        let Some(claim) = &mut self.claim else {
            return false;
        };
        if self.shortage.holds() {
            return false;
        }
        match claim() {
            Ok(()) => {
                self.claim = None;
                self.shortage.end();
                true
            }
            Err(error) => {
                self.shortage
                    .note("taking the disk over", &*error, Instant::now());
                false
            }
        }
    }

    /// When to try again.
    pub(super) fn try_at(&self) -> Option<Instant> {
        self.shortage.try_at()
    }

    pub(super) fn warning(&self) -> Option<String> {
        self.shortage.warning()
    }
}
