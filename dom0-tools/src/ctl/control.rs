//! The socket at which `xen-virtioctl` asks the supervisor.

use crate::ctl::report::Report;
pub use crate::devices::Order;
use crate::toolstack::libxl::EntryKey;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Where the supervisor listens; for root only.
pub const SOCKET_PATH: &str = "/run/xen-virtiod/control.sock";

pub use xen_virtio_backend::console::{
    INPUT as CONSOLE_INPUT, NO_ROOM as CONSOLE_NO_ROOM, RESIZE as CONSOLE_RESIZE,
};

/// The supervisor waits a second for a worker's report; a client waits a little longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A question: one JSON value, then the end of the client's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Answered by a [`Report`].
    List,
    /// Changes a device of a guest, which goes by its name or domid: the one of this name, or the only one that can be changed so.
    /// A descriptor may come beside it. Answered by what was done, or why nothing was: a `Result<String, String>`.
    Change {
        guest: String,
        device: Option<String>,
        order: Order,
    },
    /// Gives a guest a device in an empty slot of its, the one of this name or the first: `line` is as in `xen_virtio = [ … ]`.
    /// Answered by where that is, before it is served: a `Result<AttachedAt, String>`.
    Attach {
        guest: String,
        slot: Option<String>,
        line: String,
    },
    /// Takes such a device away. Answered when that has begun: a `Result<EntryKey, String>`.
    Detach { guest: String, device: String },
    /// Has each request of a device told of by the pipe that comes beside, in place of whoever is told now, unless it goes on that
    /// was begun with an earlier worker. Answered by which device that is: a `Result<String, String>`.
    Trace {
        guest: String,
        device: String,
        goes_on: bool,
    },
}

/// Where a guest has a device that was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedAt {
    pub key: EntryKey,
    /// The address of its page.
    pub base: u64,
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
    ask(path, &Question::List, None)
}

/// Has the supervisor that listens at `path` change the `device` of `guest`: the only one that can be changed so, if none is named.
/// What was done.
///
/// # Errors
///
/// [`ControlError`].
pub fn change(
    path: &Path,
    guest: String,
    device: Option<String>,
    order: Order,
) -> Result<String, ControlError> {
    let question = Question::Change {
        guest,
        device,
        order,
    };
    self::order(path, &question)
}

/// Has the supervisor that listens at `path` attach `socket` to a port of a console of `guest`'s, see [`Order::Attach`]: its only
/// one, if no `device` is named. What was done.
///
/// # Errors
///
/// [`ControlError`].
pub fn attach(
    path: &Path,
    guest: &str,
    device: Option<&str>,
    order: Order,
    socket: BorrowedFd<'_>,
) -> Result<String, ControlError> {
    let question = Question::Change {
        guest: guest.to_owned(),
        device: device.map(str::to_owned),
        order,
    };
    ask::<Result<String, String>>(path, &question, Some(socket))?.map_err(ControlError::Refused)
}

/// Has the supervisor that listens at `path` have the requests of the `device` of `guest` told of by `pipe`, in
/// [`TraceLine`](crate::ctl::trace::TraceLine)s, see [`Question::Trace`]. Which device that is.
///
/// # Errors
///
/// [`ControlError`].
pub fn trace(
    path: &Path,
    guest: &str,
    device: &str,
    goes_on: bool,
    pipe: BorrowedFd<'_>,
) -> Result<String, ControlError> {
    let question = Question::Trace {
        guest: guest.to_owned(),
        device: device.to_owned(),
        goes_on,
    };
    ask::<Result<String, String>>(path, &question, Some(pipe))?.map_err(ControlError::Refused)
}

/// Has the supervisor that listens at `path` carry out `question`, which is answered by a `Result<Answer, String>`.
///
/// # Errors
///
/// [`ControlError`].
pub fn order<Answer: DeserializeOwned>(
    path: &Path,
    question: &Question,
) -> Result<Answer, ControlError> {
    ask::<Result<Answer, String>>(path, question, None)?.map_err(ControlError::Refused)
}

/// Asks, and sends a descriptor beside the question.
fn ask<Answer: DeserializeOwned>(
    path: &Path,
    question: &Question,
    beside: Option<BorrowedFd<'_>>,
) -> Result<Answer, ControlError> {
    let mut socket = UnixStream::connect(path).map_err(|source| ControlError::Connect {
        path: path.display().to_string(),
        source,
    })?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    let question = serde_json::to_vec(question)?;
    let fds: Vec<_> = beside.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let parts = [IoSlice::new(&question)];
    let sent =
        sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
    socket.write_all(&question[sent..])?;
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
