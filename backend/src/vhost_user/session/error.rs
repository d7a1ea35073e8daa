//! What ends a session.

use super::super::connection::ConnectionError;
use super::REPLY_LIMIT;
use crate::shadow::BackendFault;
use std::io;

/// Why a back-end is given up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("it has not answered {request} for {} s", REPLY_LIMIT.as_secs())]
    Late { request: &'static str },
    #[error("it has let go of queue {queue} with requests that it had not finished")]
    Unfinished { queue: usize },
    #[error("its message {request} was not asked for")]
    Unasked { request: u32 },
    #[error("its answer to {request} has {bytes} bytes")]
    Answer { request: &'static str, bytes: usize },
    #[error("it does not take {request}: it answers {code}")]
    Refused { request: &'static str, code: u64 },
    #[error("it lets go of queue {found} where queue {queue} was to be")]
    Queue { queue: usize, found: u32 },
    #[error("it has not the features {0:#x} that a back-end needs")]
    Needs(u64),
    #[error("it has {queues} queues, and {needed} are needed")]
    Queues { queues: u64, needed: u16 },
    #[error("the kernel does not take {call}")]
    Kernel {
        call: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel does not get on with a queue")]
    Stuck,
    #[error("queue {queue}")]
    Rings {
        queue: usize,
        #[source]
        fault: BackendFault,
    },
}

impl SessionError {
    /// Whether it did what no back-end may, so that a driver cannot rely on what it has had from it.
    pub(in super::super) fn is_misbehaviour(&self) -> bool {
        match self {
            Self::Connection(ConnectionError::Message(_) | ConnectionError::Descriptors) => true,
            Self::Connection(_)
            | Self::Late { .. }
            | Self::Unfinished { .. }
            | Self::Kernel { .. }
            | Self::Stuck => false,
            Self::Unasked { .. }
            | Self::Answer { .. }
            | Self::Refused { .. }
            | Self::Queue { .. }
            | Self::Needs(_)
            | Self::Queues { .. }
            | Self::Rings { .. } => true,
        }
    }
}

/// A failure of the system's.
pub(crate) fn of_system(error: io::Error) -> SessionError {
    ConnectionError::Socket(error).into()
}
