//! How long is waited for another worker, or another service, that takes over.

use anyhow::Result;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::ctl::control::ControlError;

/// Longer than the service waits before it follows a worker that keeps dying.
const LIMIT: Duration = Duration::from_secs(90);
const WAIT: Duration = Duration::from_millis(100);

/// From when something was lost until it is given up.
pub(crate) struct Patience {
    ends: Instant,
}

impl Patience {
    pub(crate) fn begin() -> Self {
        Self {
            ends: Instant::now() + LIMIT,
        }
    }

    /// Waits before the next try: whoever connects at once finds the worker that is going.
    pub(crate) fn rest(&self) {
        sleep(WAIT);
    }

    /// Bears that a try has failed.
    ///
    /// # Errors
    ///
    /// `error`, once there were enough.
    pub(crate) fn bear(&self, error: ControlError) -> Result<()> {
        match self.is_over() {
            true => Err(error.into()),
            false => Ok(()),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.ends
    }
}
