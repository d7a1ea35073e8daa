//! What the supervisor says to a worker, and what it believes of the answers: a worker that its guest has taken
//! over says what it likes, but not more often than it is asked.

use super::dialling;
use crate::ipc::{FromWorker, SupervisorEnd, ToWorker};
use crate::text::without_controls;
use crate::toolstack::libxl::EntryKey;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use xen_virtio_backend::LATENCY_BUCKETS;
use xen_virtio_transport::DeviceReport;

/// What a worker counts of a device, under how long names; the most that any device of ours has is half of that.
const MAX_COUNTERS: usize = 64;
const MAX_COUNTER_NAME: usize = 64;

/// Characters of a worker's own words that are worth reading.
const MAX_TEXT: usize = 500;

#[derive(Debug)]
pub(super) struct Conversation {
    end: SupervisorEnd,
    unanswered: Vec<Question>,
    /// Connections that the worker has been given, and has not said of what it shares by them.
    unshared: usize,
    is_serving: bool,
}

/// What a worker has been asked, and answers with one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Attach(EntryKey),
    Serve,
    Detach(EntryKey),
    Report,
}

impl Question {
    fn of(message: &ToWorker) -> Option<Self> {
        match message {
            ToWorker::Attach(new) => Some(Self::Attach(new.key)),
            ToWorker::Claim { key, .. } => Some(Self::Attach(*key)),
            ToWorker::Serve => Some(Self::Serve),
            ToWorker::Detach { key } => Some(Self::Detach(*key)),
            ToWorker::Report => Some(Self::Report),
            ToWorker::Start { .. }
            | ToWorker::Change { .. }
            | ToWorker::Trace { .. }
            | ToWorker::Stop => None,
        }
    }

    /// The one that is answered by `message`, which is said unasked otherwise.
    fn answered_by(message: &FromWorker) -> Option<Self> {
        match message {
            FromWorker::Attached { key, .. } | FromWorker::AttachFailed { key, .. } => {
                Some(Self::Attach(*key))
            }
            FromWorker::Serving => Some(Self::Serve),
            FromWorker::Detached { key } => Some(Self::Detach(*key)),
            FromWorker::Report { .. } => Some(Self::Report),
            FromWorker::Failed { .. } | FromWorker::Shares { .. } | FromWorker::Dials { .. } => {
                None
            }
        }
    }
}

impl Conversation {
    pub(super) fn new(end: SupervisorEnd) -> Self {
        Self {
            end,
            unanswered: Vec::new(),
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
    /// As [`SupervisorEnd::send`].
    pub(super) fn send(&mut self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.end.send(message, fds)?;
        self.unanswered.extend(Question::of(message));
        // A connection to a back-end comes with the memory for it; whoever is handed on alone is shared with nobody.
        let gives = matches!(message, ToWorker::Attach(_) | ToWorker::Change { .. });
        self.unshared += usize::from(gives && fds.len() > 1);
        Ok(())
    }

    /// The next message, if there is one.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` once the worker has ended, `InvalidData` for what it was not asked for.
    pub(super) fn receive(&mut self) -> io::Result<Option<FromWorker>> {
        let Some(message) = self.end.receive()? else {
            return Ok(None);
        };
        if let Some(question) = Question::answered_by(&message) {
            let mut asked = self.unanswered.iter();
            let asked = asked.position(|asked| *asked == question);
            self.unanswered
                .swap_remove(asked.ok_or(io::ErrorKind::InvalidData)?);
        }
        if matches!(message, FromWorker::Shares { .. }) {
            let left = self.unshared.checked_sub(1);
            self.unshared = left.ok_or(io::ErrorKind::InvalidData)?;
        }
        self.is_serving |= matches!(message, FromWorker::Serving);
        Ok(Some(readable(message)))
    }

    /// Whether the worker has let go of the connection, or has nothing more to say. Messages that are still in
    /// it are dropped.
    pub(super) fn has_ended(&mut self) -> bool {
        let mut dials = 0;
        loop {
            match self.receive() {
                // As many as it may have asked before it knew.
                Ok(Some(FromWorker::Dials { .. })) if dials < dialling::MOST => dials += 1,
                // Its answers are as many as our questions, and these are the last words of others.
                Ok(Some(FromWorker::Failed { .. } | FromWorker::Dials { .. })) | Err(_) => {
                    return true;
                }
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
                    counters.retain(|name, _| is_counter(name));
                    while counters.len() > MAX_COUNTERS {
                        counters.pop_last();
                    }
                }
                device.latency.counts.truncate(LATENCY_BUCKETS);
                device.running_queues.truncate(DeviceReport::SHOWN_QUEUES);
            }
            FromWorker::Report { server, devices }
        }
        other => other,
    }
}

/// Whether it can be a counter's name, or a register's: each is a series of its own for whoever monitors the service.
fn is_counter(name: &str) -> bool {
    let is_usual = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (1..=MAX_COUNTER_NAME).contains(&name.len()) && name.chars().all(is_usual)
}

/// The beginning of `text`, without what a terminal would obey.
fn on_a_line(text: &str) -> String {
    without_controls(text.chars().take(MAX_TEXT))
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::WorkerEnd;
    use crate::toolstack::libxl::EntryForm;
    use crate::worker::event_loop::EventLoopReport;
    use xen_virtio_transport::{LatencyReport, QueueReport};

    const KEY: EntryKey = EntryKey {
        form: EntryForm::Disk,
        devid: 51712,
    };

    fn conversation() -> (Conversation, WorkerEnd) {
        let (ours, theirs) = SupervisorEnd::pair().unwrap();
        (Conversation::new(ours), WorkerEnd::new(theirs))
    }

    #[test]
    fn each_question_has_one_answer() {
        let (mut conversation, worker) = conversation();
        assert!(conversation.receive().unwrap().is_none());
        for question in [ToWorker::Serve, ToWorker::Detach { key: KEY }] {
            conversation.send(&question, &[]).unwrap();
        }
        assert!(!conversation.is_serving());
        // In any order.
        worker.send(&FromWorker::Detached { key: KEY }).unwrap();
        for _ in 0..2 {
            worker.send(&FromWorker::Serving).unwrap();
        }
        for is_serving in [false, true] {
            assert!(conversation.receive().unwrap().is_some());
            assert_eq!(conversation.is_serving(), is_serving);
        }
        let error = conversation.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    /// Nor of another device than was asked of.
    #[test]
    fn an_answer_is_to_its_question() {
        let other = EntryKey { devid: 1, ..KEY };
        for answer in [
            FromWorker::Serving,
            FromWorker::Detached { key: KEY },
            FromWorker::Detached { key: other },
        ] {
            let (mut conversation, worker) = conversation();
            conversation.send(&ToWorker::Report, &[]).unwrap();
            conversation
                .send(&ToWorker::Detach { key: other }, &[])
                .unwrap();
            worker.send(&answer).unwrap();
            let is_asked = matches!(answer, FromWorker::Detached { key } if key == other);
            assert_eq!(conversation.receive().is_ok(), is_asked, "{answer:?}");
        }
    }

    #[test]
    fn a_worker_may_say_unasked_that_it_fails() {
        let (mut conversation, worker) = conversation();
        let error = "no memory".to_owned();
        worker.send(&FromWorker::Failed { error }).unwrap();
        let message = conversation.receive().unwrap();
        assert!(matches!(message, Some(FromWorker::Failed { .. })));
        drop(worker);
        assert!(conversation.has_ended());
    }

    /// As often as it was given a connection, it may say that it shares by it.
    #[test]
    fn what_a_worker_shares_is_one_thing_a_connection() {
        let (mut conversation, worker) = conversation();
        let memory = std::fs::File::open("/dev/zero").unwrap();
        let change = ToWorker::Change {
            key: KEY,
            change: serde_json::Value::Null,
        };
        let brought = [memory.as_fd(), memory.as_fd()];
        conversation.send(&change, &brought).unwrap();
        conversation.send(&change, &brought[..1]).unwrap();
        conversation.send(&change, &[]).unwrap();
        let shares = FromWorker::Shares {
            key: KEY,
            connection: 1,
        };
        for _ in 0..2 {
            worker.send(&shares).unwrap();
        }
        let shared = conversation.receive().unwrap();
        assert!(matches!(shared, Some(FromWorker::Shares { .. })));
        let error = conversation.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn one_that_goes_on_talking_after_its_end_was_wanted_has_ended() {
        let (mut conversation, worker) = conversation();
        conversation
            .send(&ToWorker::Detach { key: KEY }, &[])
            .unwrap();
        conversation.send(&ToWorker::Stop, &[]).unwrap();
        assert!(!conversation.has_ended());
        let answer = FromWorker::Detached { key: KEY };
        worker.send(&answer).unwrap();
        assert!(!conversation.has_ended());
        worker.send(&answer).unwrap();
        assert!(conversation.has_ended());
    }

    #[test]
    fn what_a_worker_says_stays_on_its_line() {
        let (mut conversation, worker) = conversation();
        let lie = format!("\u{1b}[2Jwell\nguest 7: fine{}", "x".repeat(2 * MAX_TEXT));
        let device = DeviceReport {
            failure: Some(lie.clone()),
            traps_by_register: [(lie.clone(), 7), ("Status".to_owned(), 1)].into(),
            metrics: (0..200).map(|n| (format!("count_{n}"), n)).collect(),
            latency: LatencyReport {
                counts: vec![1; 100],
                total_ns: 0,
            },
            running_queues: vec![QueueReport::default(); 20],
            ..DeviceReport::default()
        };
        let report = FromWorker::Report {
            server: EventLoopReport::default(),
            devices: vec![(KEY, device)],
        };
        conversation.send(&ToWorker::Report, &[]).unwrap();
        conversation.unanswered.push(Question::Attach(KEY));
        let error = lie.clone();
        let refused = FromWorker::AttachFailed {
            key: KEY,
            error,
            busy: false,
        };
        let failed = FromWorker::Failed { error: lie };
        for message in [report, refused, failed] {
            worker.send(&message).unwrap();
        }
        for _ in 0..3 {
            let text = match conversation.receive().unwrap() {
                Some(FromWorker::Report { mut devices, .. }) => {
                    let device = devices.remove(0).1;
                    let registers: Vec<_> = device.traps_by_register.into_keys().collect();
                    assert_eq!(registers, ["Status"]);
                    assert_eq!(device.metrics.len(), MAX_COUNTERS);
                    assert_eq!(device.latency.counts.len(), LATENCY_BUCKETS);
                    assert_eq!(device.running_queues.len(), DeviceReport::SHOWN_QUEUES);
                    device.failure.unwrap()
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
