//! The socket at which `xen-virtioctl` asks the supervisor.

use crate::report::Report;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    List,
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
    #[error("xen-virtiod's answer is not understood: is it of another version?")]
    Answer(#[from] serde_json::Error),
}

/// Asks the supervisor that listens at `path` what `xen-virtioctl list` shows.
///
/// # Errors
///
/// [`ControlError`].
pub fn list(path: &Path) -> Result<Report, ControlError> {
    let mut socket = UnixStream::connect(path).map_err(|source| ControlError::Connect {
        path: path.display().to_string(),
        source,
    })?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    socket.write_all(&serde_json::to_vec(&Question::List)?)?;
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
