//! The socket at which `xen-virtioctl` asks the supervisor.

use crate::ctl::report::Report;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Where the supervisor listens; for root only.
pub const SOCKET_PATH: &str = "/run/xen-virtiod/control.sock";

/// The supervisor waits a second for a worker's report; a client waits a little longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A question: one JSON value, then the end of the client's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Answered by a [`Report`].
    List,
    /// Tells a guest, by its name or domid, of what was added to its disk. Answered by what was done, or why nothing
    /// was: a `Result<String, String>`.
    Resize { guest: String, device: String },
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(
        "xen-virtiod does not answer at {path}: is it running (systemctl status xen-virtiod), and are you root?"
    )]
    Connect { path: String, source: io::Error },
    #[error("xen-virtiod does not answer")]
    Connection(#[from] io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("xen-virtiod's answer is not understood: is it of another version?")]
    Answer(#[from] serde_json::Error),
}

/// Asks the supervisor that listens at `path` what `xen-virtioctl list` shows.
///
/// # Errors
///
/// [`ControlError`].
pub fn list(path: &Path) -> Result<Report, ControlError> {
    ask(path, &Question::List)
}

/// Has the supervisor that listens at `path` tell `guest` of the size that its disk `device` has now. What was done.
///
/// # Errors
///
/// [`ControlError`].
pub fn resize(path: &Path, guest: String, device: String) -> Result<String, ControlError> {
    ask::<Result<String, String>>(path, &Question::Resize { guest, device })?
        .map_err(ControlError::Refused)
}

fn ask<Answer: DeserializeOwned>(path: &Path, question: &Question) -> Result<Answer, ControlError> {
    let mut socket = UnixStream::connect(path).map_err(|source| ControlError::Connect {
        path: path.display().to_string(),
        source,
    })?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    socket.write_all(&serde_json::to_vec(question)?)?;
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
