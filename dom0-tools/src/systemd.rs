//! What systemd has opened for this process (`sd_listen_fds(3)`).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The descriptors, with the names that they have in its unit or were stored by. Asked for once.
///
/// # Errors
///
/// If what the environment says of them makes no sense.
pub(crate) fn given() -> io::Result<Vec<(String, OwnedFd)>> {
    let given = sd_notify::listen_fds_with_names()?.map(|(number, name)| {
        // SAFETY: the manager has opened it for this process, where nobody else knows of it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        (name, descriptor)
    });
    Ok(given.collect())
}
