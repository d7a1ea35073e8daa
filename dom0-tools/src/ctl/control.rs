//! The socket at which `xen-virtioctl` asks the supervisor.

use crate::ctl::report::Report;
pub use crate::devices::Order;
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
    /// Changes a device of a guest, which goes by its name or domid. Answered by what was done, or why nothing was: a
    /// `Result<String, String>`.
    Change {
        guest: String,
        device: String,
        order: Order,
    },
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

/// Has the supervisor that listens at `path` change the `device` of `guest`. What was done.
///
/// # Errors
///
/// [`ControlError`].
pub fn change(
    path: &Path,
    guest: String,
    device: String,
    order: Order,
) -> Result<String, ControlError> {
    let question = Question::Change {
        guest,
        device,
        order,
    };
    ask::<Result<String, String>>(path, &question)?.map_err(ControlError::Refused)
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
