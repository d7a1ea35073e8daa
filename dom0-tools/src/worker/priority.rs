//! A worker's priority, which it raises while it sleeps in place of looking, see
//! [`contention`](crate::worker::contention).
//!
//! Such a worker takes the processor for a guest's requests alone, and beside a computation in dom0 it would otherwise wait
//! for the end of that one's turn whenever it has had more of the last milliseconds. One that looks must not have it: it would
//! keep the kernel's threads from the disk.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;

/// The nice value of a worker that sleeps in place of looking: three times the share of the others.
const RAISED: i32 = -5;
/// `RLIMIT_NICE` counts down from here.
const NICE_LIMIT_ORIGIN: i32 = 20;

/// Has this process keep the right to raise its priority when it gives up the others.
///
/// # Errors
///
/// The system's: it has no such right (`LimitNICE=-5` in its unit gives it).
pub(super) fn allow() -> io::Result<()> {
    let wanted = u64::from((NICE_LIMIT_ORIGIN - RAISED).unsigned_abs());
    let (_, most) = getrlimit(Resource::RLIMIT_NICE)?;
    setrlimit(Resource::RLIMIT_NICE, wanted, most.max(wanted))?;
    Ok(())
}

/// Raises this thread's priority, or takes that back. A worker that may not raise it goes on without.
pub(super) fn set(raised: bool) {
    let nice = if raised { RAISED } else { 0 };
    let _ = rustix::process::setpriority_process(None, nice);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpriority_process;

    #[test]
    fn a_thread_has_its_priority_for_itself() {
        let raised = std::thread::spawn(|| {
            // Whoever runs the tests may not be allowed to.
            let before = getpriority_process(None).unwrap();
            set(true);
            let raised = getpriority_process(None).unwrap();
            assert!([before, RAISED].contains(&raised));
            set(false);
            assert_eq!(getpriority_process(None).unwrap(), 0.max(before));
        });
        raised.join().unwrap();
    }
}
