//! A worker's time slice: a short one, so that the kernel lets it run as soon as a guest waits for it.
//!
//! With slices of one length a task that wakes up waits until the one that runs has had its slice, a computation in dom0 as
//! well. From Linux 6.12 on a task with a shorter one goes first, as long as it has not had more than its share of the processor
//! (`PREEMPT_SHORT`, `kernel/sched/features.h`). Nobody gets more or less by it.

use std::io;
use std::time::Duration;

/// Less than the kernel's own at any number of processors (0.7 ms and more), and enough for a batch of requests: workers do
/// not take the processor from each other in the middle of one.
const SLICE: Duration = Duration::from_micros(500);

/// Asks for a short slice for this thread. A kernel before 6.12 has one length for all, and ignores it.
///
/// # Errors
///
/// The kernel's.
pub(super) fn shorten() -> io::Result<()> {
    let size = size_of::<libc::sched_attr>();
    let len = libc::c_uint::try_from(size).map_err(io::Error::other)?;
    // SAFETY: all of its fields are numbers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes up to as many bytes as the structure has.
    let status = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, len, 0) };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.size = len;
    attributes.sched_runtime = u64::try_from(SLICE.as_nanos()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads the structure, which says how large it is.
    let status = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    match status {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
