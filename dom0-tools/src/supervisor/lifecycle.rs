//! What follows from what happens to one guest: pure, so that every situation can be tried.
//!
//! [`Lifecycle::on`] takes an [`Event`] and returns the [`Effect`]s that it has beyond this state; the guest performs them,
//! and tells of how those ended that can end in several ways.

use super::closing::ClosingEntries;
use super::entry::{DeviceEntry, Status, TRY_AGAIN};
use super::restarts::Restarts;
use crate::toolstack::libxl::EntryKey;
use std::collections::BTreeMap;
use std::time::Instant;

/// Something that has happened to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Its toolstack has given it a device, which the guest may have had from an earlier worker (`served`).
    Appeared {
        key: EntryKey,
        served: bool,
    },
    /// Its toolstack says of a device that an earlier supervisor has served it, of which nothing is known.
    Unrecorded {
        key: EntryKey,
    },
    /// All devices that come together have appeared.
    Settled,
    /// Its toolstack wants a device closed.
    Closing {
        key: EntryKey,
    },
    /// A device is gone from its toolstack.
    Gone {
        key: EntryKey,
    },
    /// What a device needs was opened.
    Opened {
        key: EntryKey,
    },
    /// … or not; somebody may let go of it soon (`busy`).
    NotOpened {
        key: EntryKey,
        busy: bool,
        error: String,
    },
    /// A worker was started.
    Started,
    NotStarted {
        error: String,
    },
    /// The worker takes no message, has ended, or says what it was not asked for.
    Broken {
        why: &'static str,
    },
    /// The worker that was given up has died.
    Died {
        how: String,
        why: &'static str,
    },
    /// The worker says that it cannot serve the guest.
    CannotServe {
        error: String,
    },
    /// The worker has a device.
    Attached {
        key: EntryKey,
    },
    NotAttached {
        key: EntryKey,
        busy: bool,
        error: String,
    },
    /// The worker has given a device up.
    GaveUp {
        key: EntryKey,
    },
    /// It is time for what [`Lifecycle::again_at`] says.
    Again,
}

/// What is to be done about it, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Open what a device needs: [`Event::Opened`] or [`Event::NotOpened`] follows.
    Open {
        key: EntryKey,
    },
    /// See what is to be done now that all that was to be opened is: [`Event::Settled`] follows.
    Settle,
    /// Start a worker: [`Event::Started`] or [`Event::NotStarted`] follows. Those that an earlier supervisor has left are
    /// ended first (`ends_earlier`), unless one of them has `missed`, which this supervisor could not open.
    Start {
        ends_earlier: bool,
        missed: Option<EntryKey>,
    },
    /// Hand the worker a device that was opened.
    Hand {
        key: EntryKey,
        served: bool,
    },
    /// Tell the worker to give a device up.
    Detach {
        key: EntryKey,
    },
    /// Tell the worker to answer the guest.
    Serve,
    /// End the worker: [`Event::Died`] follows.
    Kill {
        why: &'static str,
    },
    /// Keep the guest from running.
    Hold,
    /// Let it run again.
    LetRun,
    /// Tell the toolstack that a device is served.
    TellReady {
        key: EntryKey,
    },
    /// Tell the toolstack that a device is closed.
    TellClosed {
        key: EntryKey,
    },
    /// The guest uses a device no more; a worker may.
    EndUse {
        key: EntryKey,
    },
    /// Nobody has a device any more: forget what was kept of it.
    Release {
        key: EntryKey,
    },
    /// The guest's worker is at work.
    LogServing,
    LogLost {
        why: &'static str,
        how: String,
    },
    /// The guest's error is news.
    LogFailure {
        error: String,
    },
    /// A device's error is news.
    LogDevice {
        key: EntryKey,
        error: String,
    },
    /// A device waits, and what for is news.
    LogWaiting {
        key: EntryKey,
        why: String,
    },
    /// A device's page was claimed for the first time.
    LogClaimed {
        key: EntryKey,
    },
}

/// Where the guest's worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worker {
    None,
    Running,
    /// It was given up, and may use what the next one needs.
    Dying,
}

/// One guest, from its first device to its end.
pub(super) struct Lifecycle {
    /// An earlier supervisor's worker has served it, and may be serving it still.
    served_earlier: bool,
    /// It has devices, or has had them: without a worker its accesses would wait for ever.
    served: bool,
    /// It is kept from running, for want of a device that nobody else waits for.
    held: bool,
    worker: Worker,
    restarts: Restarts,
    /// When a worker is to be started again, or a device to be opened again.
    again_at: Option<Instant>,
    error: Option<String>,
    pub(super) entries: BTreeMap<EntryKey, DeviceEntry>,
    pub(super) closing: ClosingEntries,
}

const UNRECORDED: &str = "was served by an earlier xen-virtiod, of whose state nothing is left; destroy and create the \
                          guest to have it served by this one";

impl Lifecycle {
    /// A guest without devices, of which an earlier supervisor may have left a worker (`served_earlier`).
    pub(super) fn new(served_earlier: bool, now: Instant) -> Self {
        Self {
            served_earlier,
            served: served_earlier,
            held: false,
            worker: Worker::None,
            restarts: Restarts::new(now),
            again_at: None,
            error: None,
            entries: BTreeMap::new(),
            closing: ClosingEntries::default(),
        }
    }

    /// Whether all of its entries are to be taken over at once: its accesses must not be answered before.
    pub(super) fn is_to_be_taken_over(&self) -> bool {
        self.served_earlier && self.entries.is_empty() && self.again_at.is_none()
    }

    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    pub(super) fn again_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// Why there is no worker.
    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// How often a worker was followed by another one.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts.count()
    }

    /// Whether the guest needs no worker, or has been told why there is none.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.served || self.error.is_some()
    }

    /// The guest is gone: whether an earlier supervisor's worker may be left of it.
    pub(super) fn take_served_earlier(&mut self) -> bool {
        std::mem::take(&mut self.served_earlier)
    }

    /// Whether the worker has the device.
    pub(super) fn has_handed(&self, key: EntryKey) -> bool {
        let known = self.entries.get(&key);
        known.is_some_and(|known| matches!(known.status, Status::Handed))
    }

    /// What follows from `event` at `now`.
    pub(super) fn on(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let mut effects = self.follow(event, now);
        let mut entries = self.entries.iter();
        let holds = entries.any(|(key, known)| known.holds_guest(key.form));
        match (self.held, holds) {
            // Before anything that takes its time.
            (false, true) => effects.insert(0, Effect::Hold),
            (true, false) => effects.push(Effect::LetRun),
            _ => {}
        }
        self.held = holds;
        effects
    }

    fn follow(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        match event {
            Event::Appeared { key, served } => {
                self.entries.insert(key, DeviceEntry::new(key, served, now));
                vec![Effect::Open { key }]
            }
            Event::Unrecorded { key } => {
                let mut known = DeviceEntry::new(key, true, now);
                known.status = Status::Lost(UNRECORDED.to_owned());
                self.entries.insert(key, known);
                let error = UNRECORDED.to_owned();
                vec![Effect::LogDevice { key, error }]
            }
            Event::Opened { key } => {
                if let Some(known) = self.entries.get_mut(&key) {
                    known.status = Status::Pending;
                }
                Vec::new()
            }
            Event::NotOpened { key, busy, error } => self.fails(key, busy, error),
            Event::Settled => self.settle(now),
            Event::Closing { key } => {
                let mut effects = self.withdraw(key);
                if !self.served {
                    effects.push(Effect::TellClosed { key });
                }
                effects
            }
            Event::Gone { key } if self.entries.contains_key(&key) => self.withdraw(key),
            Event::Gone { .. } => Vec::new(),
            Event::Started => self.begin(),
            Event::NotStarted { error } => {
                self.plan_again(now + TRY_AGAIN);
                self.fail(error)
            }
            Event::Broken { why } => self.give_up(why),
            Event::CannotServe { error } => {
                let mut effects = self.fail(error);
                effects.extend(self.give_up("it cannot serve"));
                effects
            }
            Event::Died { how, why } => self.died(how, why, now),
            Event::Attached { key } if self.has_handed(key) => {
                let known = self.entries.get_mut(&key).expect("it was handed over");
                let first = known.claimed(now);
                let mut effects = vec![Effect::TellReady { key }];
                effects.extend(first.then_some(Effect::LogClaimed { key }));
                effects
            }
            Event::NotAttached { key, busy, error } if self.has_handed(key) => {
                let effects = self.fails(key, busy, error);
                self.plan_next_try(now);
                effects
            }
            // A worker has no other device than it was handed.
            Event::Attached { .. } | Event::NotAttached { .. } => Vec::new(),
            Event::GaveUp { key } => {
                self.closing.gave_up(key);
                Vec::new()
            }
            Event::Again => self.again(),
        }
    }

    fn fails(&mut self, key: EntryKey, busy: bool, error: String) -> Vec<Effect> {
        let status = if busy { Status::Busy } else { Status::Failed };
        let Some(known) = self.entries.get_mut(&key) else {
            return Vec::new();
        };
        let mut effects = Vec::new();
        // What is tried again and again is logged once.
        if known.fails(status, &error) {
            effects.push(match busy {
                true => Effect::LogWaiting { key, why: error },
                false => Effect::LogDevice { key, error },
            });
        }
        // Others may have what a guest was to have, and has not got.
        if !known.served && !busy {
            effects.push(Effect::EndUse { key });
        }
        effects
    }

    fn fail(&mut self, error: String) -> Vec<Effect> {
        let is_news = self.error.as_ref() != Some(&error);
        self.error = Some(error.clone());
        if is_news {
            vec![Effect::LogFailure { error }]
        } else {
            Vec::new()
        }
    }

    /// Hands to the worker what waits for it; has one started, if there is none.
    fn settle(&mut self, now: Instant) -> Vec<Effect> {
        let mut pending = self.entries.values();
        let pending = pending.any(|known| matches!(known.status, Status::Pending));
        let wants_worker = (self.served || pending) && self.again_at.is_none();
        let effects = match self.worker {
            Worker::Running => self.hand_pending(),
            Worker::None if wants_worker => vec![Effect::Start {
                // Also one of a guest that had this domid before, if no supervisor was there to end it.
                ends_earlier: self.served_earlier || !self.served,
                missed: self.missed(),
            }],
            Worker::None | Worker::Dying => Vec::new(),
        };
        // A guest without a worker has nothing that was ever served; a disk that somebody lets go of soon it may have.
        self.plan_next_try(now);
        effects
    }

    /// A device that an earlier worker may have, and that could not be opened: one that serves all its devices is better
    /// than one that cannot.
    fn missed(&self) -> Option<EntryKey> {
        let mut entries = self.entries.iter();
        let missed = entries.find(|(_, known)| known.is_missed());
        missed.filter(|_| self.served_earlier).map(|(key, _)| *key)
    }

    fn hand_pending(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (key, known) in &mut self.entries {
            if matches!(known.status, Status::Pending) {
                known.status = Status::Handed;
                let (key, served) = (*key, known.served);
                effects.push(Effect::Hand { key, served });
            }
        }
        effects
    }

    fn begin(&mut self) -> Vec<Effect> {
        self.served_earlier = false;
        self.served = true;
        self.error = None;
        self.worker = Worker::Running;
        let mut effects = vec![Effect::LogServing];
        // First, so that a device that has come back under the same name is not the one given up.
        let entries = &self.entries;
        let is_served = |key| entries.get(&key).is_some_and(|known| known.served);
        let given_up = self.closing.not_given_up(is_served).into_iter();
        effects.extend(given_up.map(|key| Effect::Detach { key }));
        effects.extend(self.hand_pending());
        effects.push(Effect::Serve);
        effects
    }

    /// Starts a worker in place of one that has died, which is given what that one had; and opens those devices that could
    /// not be.
    fn again(&mut self) -> Vec<Effect> {
        self.again_at = None;
        let has_worker = self.worker == Worker::Running;
        let is_again = |known: &DeviceEntry| match known.status {
            Status::Handed | Status::Pending => !has_worker,
            Status::Failed(_) | Status::Busy(_) => known.try_again_after().is_some(),
            Status::New | Status::Lost(_) => false,
        };
        let again = self.entries.iter().filter(|(_, known)| is_again(known));
        again
            .map(|(key, _)| Effect::Open { key: *key })
            .chain([Effect::Settle])
            .collect()
    }

    /// A device is not the guest's any more. A worker says when it has given it up, if there was one ever.
    fn withdraw(&mut self, key: EntryKey) -> Vec<Effect> {
        let known = self.entries.remove(&key);
        let mut effects = vec![Effect::EndUse { key }];
        if self.served {
            // The next worker is told too, if this one dies before it says so.
            self.closing.begin(key, known.and_then(|known| known.base));
            effects.extend((self.worker == Worker::Running).then_some(Effect::Detach { key }));
        } else {
            effects.push(Effect::Release { key });
        }
        effects
    }

    /// Ends a worker that cannot be worked with. Another one takes the guest over: at once, unless this one has said why it
    /// cannot.
    fn give_up(&mut self, why: &'static str) -> Vec<Effect> {
        if self.worker != Worker::Running {
            return Vec::new();
        }
        self.worker = Worker::Dying;
        vec![Effect::Kill { why }]
    }

    fn died(&mut self, how: String, why: &'static str, now: Instant) -> Vec<Effect> {
        self.worker = Worker::None;
        if self.error.is_some() {
            self.again_at = Some(now + TRY_AGAIN);
            return Vec::new();
        }
        self.again_at = Some(self.restarts.next(now));
        vec![Effect::LogLost { why, how }]
    }

    /// Sees to it that what has failed is tried again, if that may help.
    fn plan_next_try(&mut self, now: Instant) {
        let entries = self.entries.values();
        let after = entries.filter_map(DeviceEntry::try_again_after).min();
        if let Some(after) = after {
            self.plan_again(now + after);
        }
    }

    fn plan_again(&mut self, at: Instant) {
        self.again_at = Some(self.again_at.map_or(at, |planned| planned.min(at)));
    }
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
