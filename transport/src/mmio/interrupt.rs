//! A device's interrupt line, which is raised again if it could not be.

use crate::hypervisor::InterruptLine;
use std::time::{Duration, Instant};
use xen_virtio_backend::LogLimit;

/// The wait between attempts: nothing tells when dom0 or Xen has what was lacking.
const RETRY: Duration = Duration::from_millis(10);

pub(crate) struct Interrupt {
    line: Box<dyn InterruptLine>,
    raised: u64,
    /// The last attempt failed: an edge that the driver has not seen. When to try again.
    retry_at: Option<Instant>,
    log_limit: LogLimit,
}

impl Interrupt {
    pub(crate) fn new(line: Box<dyn InterruptLine>) -> Self {
        Self {
            line,
            raised: 0,
            retry_at: None,
            log_limit: LogLimit::default(),
        }
    }

    /// Raises the line even if an earlier cause is not yet acknowledged: a driver may look at its rings
    /// before it acknowledges.
    pub(crate) fn raise(&mut self) {
        self.raised += 1;
        self.raise_line();
    }

    /// Raises the line again if it could not be raised the last time.
    pub(crate) fn retry(&mut self) {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.raise_line();
        }
    }

    /// When [`Interrupt::retry`] has something to do.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    fn raise_line(&mut self) {
        let result = self.line.raise();
        self.retry_at = result.is_err().then(|| Instant::now() + RETRY);
        if let Err(error) = result
            && self.log_limit.allow()
        {
            tracing::warn!("the guest's interrupt cannot be raised: {error}");
        }
    }

    pub(crate) fn raised(&self) -> u64 {
        self.raised
    }
}
