//! What the supervisor says to a worker, and what it believes of the answers: a worker that its guest has taken
//! over says what it likes, but not more often than it is asked.

use crate::ipc::{Channel, FromWorker, ToWorker};
use crate::text::without_controls;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Characters of a worker's own words that are worth reading.
const MAX_TEXT: usize = 500;

#[derive(Debug)]
pub(super) struct Conversation {
    channel: Channel,
    /// Questions that have not been answered.
    unanswered: usize,
    /// Connections that the worker has been given, and has not said of what it shares by them.
    unshared: usize,
    is_serving: bool,
}

impl Conversation {
    pub(super) fn new(channel: Channel) -> Self {
        Self {
            channel,
            unanswered: 0,
            unshared: 0,
            is_serving: false,
        }
    }

    /// Whether the worker has said that it serves its guest: it then goes on with that without us.
    pub(super) fn is_serving(&self) -> bool {
        self.is_serving
    }

    /// # Errors
    ///
    /// As [`Channel::send`].
    pub(super) fn send(&mut self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.channel.send(message, fds)?;
        self.unanswered += usize::from(message.is_question());
        let gives = matches!(message, ToWorker::Attach(_) | ToWorker::Change { .. });
        self.unshared += usize::from(gives && !fds.is_empty());
        Ok(())
    }

    /// The next message, if there is one, and the descriptor of one that has it.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` once the worker has ended, `InvalidData` for what it was not asked for.
    pub(super) fn receive(&mut self) -> io::Result<Option<(FromWorker, Option<OwnedFd>)>> {
        let Some((message, fds)) = self.channel.receive()? else {
            return Ok(None);
        };
        let left = match message {
            FromWorker::Failed { .. } => None,
            FromWorker::Shares { .. } => Some(&mut self.unshared),
            _ => Some(&mut self.unanswered),
        };
        if let Some(left) = left {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::InvalidData)?;
        }
        self.is_serving |= matches!(message, FromWorker::Serving);
        Ok(Some((readable(message), fds.into_iter().next())))
    }

    /// Whether the worker has let go of the connection, or has nothing more to say. Messages that are still in
    /// it are dropped.
    pub(super) fn has_ended(&mut self) -> bool {
        loop {
            match self.receive() {
                // Its answers are as many as our questions, and this is the last word of others.
                Ok(Some((FromWorker::Failed { .. }, _))) | Err(_) => return true,
                Ok(Some(_)) => {}
                Ok(None) => return false,
            }
        }
    }
}

/// `message` with its words made fit for logs and terminals.
fn readable(message: FromWorker) -> FromWorker {
    match message {
        FromWorker::Failed { error } => FromWorker::Failed {
            error: on_a_line(&error),
        },
        FromWorker::AttachFailed { key, error, busy } => FromWorker::AttachFailed {
            key,
            error: on_a_line(&error),
            busy,
        },
        FromWorker::Report {
            server,
            mut devices,
        } => {
            for (_, device) in &mut devices {
                for text in [
                    &mut device.failure,
                    &mut device.misstep,
                    &mut device.warning,
                ] {
                    *text = text.as_deref().map(on_a_line);
                }
                for counters in [&mut device.traps_by_register, &mut device.metrics] {
                    *counters = std::mem::take(counters)
                        .into_iter()
                        .map(|(name, count)| (on_a_line(&name), count))
                        .collect();
                }
            }
            FromWorker::Report { server, devices }
        }
        other => other,
    }
}

/// The beginning of `text`, without what a terminal would obey.
fn on_a_line(text: &str) -> String {
    without_controls(text.chars().take(MAX_TEXT))
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::{EntryForm, EntryKey};
    use crate::worker::event_loop::EventLoopReport;
    use xen_virtio_transport::DeviceReport;

    const KEY: EntryKey = EntryKey {
        form: EntryForm::Disk,
        devid: 51712,
    };

    fn conversation() -> (Conversation, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        (Conversation::new(ours), Channel::new(theirs))
    }

    #[test]
    fn each_question_has_one_answer() {
        let (mut conversation, worker) = conversation();
        assert!(conversation.receive().unwrap().is_none());
        for question in [ToWorker::Serve, ToWorker::Detach { key: KEY }] {
            conversation.send(&question, &[]).unwrap();
        }
        assert!(!conversation.is_serving());
        for _ in 0..3 {
            worker.send(&FromWorker::Serving, &[]).unwrap();
        }
        for _ in 0..2 {
            assert!(conversation.receive().unwrap().is_some());
            assert!(conversation.is_serving());
        }
        let error = conversation.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_worker_may_say_unasked_that_it_fails() {
        let (mut conversation, worker) = conversation();
        let error = "no memory".to_owned();
        worker.send(&FromWorker::Failed { error }, &[]).unwrap();
        let message = conversation.receive().unwrap();
        assert!(matches!(message, Some((FromWorker::Failed { .. }, None))));
        drop(worker);
        assert!(conversation.has_ended());
    }

    /// As often as it was given a connection, it may hand over a memory.
    #[test]
    fn what_a_worker_shares_is_one_thing_a_connection() {
        let (mut conversation, worker) = conversation();
        let memory = std::fs::File::open("/dev/zero").unwrap();
        let change = ToWorker::Change {
            key: KEY,
            change: serde_json::Value::Null,
        };
        conversation.send(&change, &[memory.as_fd()]).unwrap();
        conversation.send(&change, &[]).unwrap();
        let shares = FromWorker::Shares {
            key: KEY,
            connection: 1,
        };
        for _ in 0..2 {
            worker.send(&shares, &[memory.as_fd()]).unwrap();
        }
        let shared = conversation.receive().unwrap();
        assert!(matches!(shared, Some((FromWorker::Shares { .. }, Some(_)))));
        let error = conversation.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn one_that_goes_on_talking_after_its_end_was_wanted_has_ended() {
        let (mut conversation, worker) = conversation();
        conversation.send(&ToWorker::Report, &[]).unwrap();
        conversation.send(&ToWorker::Stop, &[]).unwrap();
        assert!(!conversation.has_ended());
        let answer = FromWorker::Attached {
            key: KEY,
            known: None,
        };
        worker.send(&answer, &[]).unwrap();
        assert!(!conversation.has_ended());
        worker.send(&answer, &[]).unwrap();
        assert!(conversation.has_ended());
    }

    #[test]
    fn what_a_worker_says_stays_on_its_line() {
        let (mut conversation, worker) = conversation();
        let lie = format!("\u{1b}[2Jwell\nguest 7: fine{}", "x".repeat(2 * MAX_TEXT));
        let device = DeviceReport {
            failure: Some(lie.clone()),
            traps_by_register: [(lie.clone(), 7)].into(),
            metrics: [(lie.clone(), 7)].into(),
            ..DeviceReport::default()
        };
        let report = FromWorker::Report {
            server: EventLoopReport::default(),
            devices: vec![(KEY, device)],
        };
        conversation.send(&ToWorker::Report, &[]).unwrap();
        conversation.send(&ToWorker::Report, &[]).unwrap();
        let error = lie.clone();
        worker.send(&report, &[]).unwrap();
        worker
            .send(
                &FromWorker::AttachFailed {
                    key: KEY,
                    error,
                    busy: false,
                },
                &[],
            )
            .unwrap();
        worker
            .send(&FromWorker::Failed { error: lie }, &[])
            .unwrap();
        for _ in 0..3 {
            let text = match conversation.receive().unwrap().map(|(message, _)| message) {
                Some(FromWorker::Report { mut devices, .. }) => {
                    let device = devices.remove(0).1;
                    [device.traps_by_register, device.metrics]
                        .map(|counters| counters.into_keys().next().unwrap())
                        .concat()
                        + &device.failure.unwrap()
                }
                Some(FromWorker::AttachFailed { error, .. } | FromWorker::Failed { error }) => {
                    error
                }
                other => panic!("{other:?}"),
            };
            assert!(!text.contains(char::is_control), "{text:?}");
            assert!(text.chars().count() <= 3 * MAX_TEXT);
        }
    }
}
