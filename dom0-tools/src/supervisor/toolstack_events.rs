//! What follows from what the toolstack says: guests and devices that come and go.

use super::device_action::{DeviceAction, Ours};
use super::guest::Guest;
use super::lifecycle::Event;
use super::{MAX_REFUSALS, STOP_LIMIT, Stopping, Supervisor, tolerate};
use crate::ipc::ToWorker;
use crate::program;
use crate::toolstack::libxl::EntryKey;
use crate::toolstack::{ToolstackError, ToolstackEvent};
use anyhow::Result;
use std::collections::BTreeSet;
use std::collections::btree_map::Entry;
use std::time::Instant;

impl Supervisor {
    pub(super) fn follow_toolstack(&mut self) -> Result<()> {
        while let Some(event) = self.toolstack.next_event()? {
            match event {
                ToolstackEvent::GuestsWent => tolerate(self.release_guests())?,
                ToolstackEvent::GuestsCame => tolerate(self.greet_guests())?,
                ToolstackEvent::Device(domid, key) => tolerate(self.follow_entry(domid, key))?,
                ToolstackEvent::AnyDevice => {
                    let known = self
                        .guests
                        .iter()
                        .flat_map(|(domid, guest)| guest.keys().map(|key| (*domid, key)));
                    let mut all: BTreeSet<_> = known.collect();
                    match self.toolstack.devices() {
                        Ok(devices) => all.extend(devices),
                        refused => tolerate(refused.map(drop))?,
                    }
                    for (domid, key) in all {
                        tolerate(self.follow_entry(domid, key))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells the toolstack of guests that have come up: it may have devices for them.
    fn greet_guests(&mut self) -> Result<(), ToolstackError> {
        let mut result = Ok(());
        for domid in self.toolstack.domids()? {
            // What is refused of one is no reason to keep the others waiting.
            result = result.and(self.greet(domid));
        }
        result
    }

    fn greet(&mut self, domid: u16) -> Result<(), ToolstackError> {
        // One that is being built has no vCPU yet, and one that is dead may have left its nodes.
        if domid == 0 || !self.toolstack.lives(domid)? {
            return Ok(());
        }
        self.replace_stale(domid)?;
        let guest = self.toolstack.identify(domid)?;
        let served = self.files.has(&guest);
        self.toolstack.guest_came(&guest, served)
    }

    /// Brings what the toolstack says of a device and what we have of it together.
    fn follow_entry(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError> {
        self.replace_stale(domid)?;
        self.take_over(domid)?;
        let state = self.toolstack.state(domid, key)?;
        let ours = match self.guests.get(&domid) {
            None => Ours::NoGuest,
            Some(guest) if guest.knows(key) => Ours::Device,
            Some(_) => Ours::Guest,
        };
        match DeviceAction::of(state, ours) {
            DeviceAction::Nothing => Ok(()),
            DeviceAction::Begin => self.begin(domid, key),
            DeviceAction::Unrecorded => {
                self.have_guest(domid)?;
                self.tell(domid, Event::Unrecorded { key })
            }
            DeviceAction::Close => {
                self.note_refusals(domid, Some(key));
                self.tell(domid, Event::Closing { key })
            }
            DeviceAction::TellClosed => self.toolstack.tell_closed(domid, key),
            DeviceAction::Withdraw => {
                self.note_refusals(domid, Some(key));
                self.tell(domid, Event::Gone { key })
            }
        }
    }

    fn begin(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError> {
        self.have_guest(domid)?;
        // The last guest of this domid must not be served on as this one.
        for stopping in &mut self.stopping {
            if stopping.guest.domid == domid && stopping.deadline.take().is_some() {
                stopping.worker.kill(self.poll.registry());
            }
        }
        let served = false;
        self.tell(domid, Event::Appeared { key, served })?;
        self.tell(domid, Event::Settled)
    }

    fn have_guest(&mut self, domid: u16) -> Result<(), ToolstackError> {
        if let Entry::Vacant(place) = self.guests.entry(domid) {
            place.insert(Guest::read(&mut *self.toolstack, &self.files, domid)?);
        }
        Ok(())
    }

    /// Keeps what a guest that is given up was refused for, as long as somebody may ask.
    fn note_refusals(&mut self, domid: u16, key: Option<EntryKey>) {
        if let Some(guest) = self.guests.get(&domid) {
            self.refusals.extend(guest.refusals(key));
            let excess = self.refusals.len().saturating_sub(MAX_REFUSALS);
            self.refusals.drain(..excess);
        }
    }

    /// Takes over a guest that an earlier supervisor has served, with all its devices at once: none of its
    /// accesses may be answered before.
    pub(super) fn take_over(&mut self, domid: u16) -> Result<(), ToolstackError> {
        let guest = match self.guests.entry(domid) {
            Entry::Occupied(guest) => guest.into_mut(),
            Entry::Vacant(place) => {
                let guest = Guest::read(&mut *self.toolstack, &self.files, domid)?;
                if !guest.is_to_be_taken_over() {
                    return Ok(());
                }
                place.insert(guest)
            }
        };
        if !guest.is_to_be_taken_over() {
            return Ok(());
        }
        for (key, served) in self.toolstack.active_devices(domid)? {
            self.tell(domid, Event::Appeared { key, served })?;
        }
        self.tell(domid, Event::Settled)
    }

    /// A domid that came round again is another guest: its worker goes.
    fn replace_stale(&mut self, domid: u16) -> Result<(), ToolstackError> {
        if let Some(guest) = self.guests.get(&domid) {
            let now = self.toolstack.identify(domid)?;
            if guest.identity().is_followed_by(&now) {
                self.release_guest(domid);
            }
        }
        Ok(())
    }

    fn release_guests(&mut self) -> Result<(), ToolstackError> {
        let domids: Vec<u16> = self.guests.keys().copied().collect();
        for domid in domids {
            if !self.toolstack.lives(domid)? {
                self.release_guest(domid);
            }
        }
        Ok(())
    }

    fn release_guest(&mut self, domid: u16) {
        self.note_refusals(domid, None);
        if let Some(mut guest) = self.guests.remove(&domid) {
            if let Err(error) = self.toolstack.guest_went(guest.identity()) {
                tracing::warn!("{error}");
            }
            tracing::info!(guest = guest.name(), domid, "it is gone");
            self.back_ends.end_guest(domid, self.poll.registry());
            self.listeners.end_guest(domid, self.poll.registry());
            self.dialling.end_guest(domid);
            if let Err(error) = self.descriptors.end_guest(domid) {
                let guest = guest.name();
                tracing::warn!(
                    guest,
                    domid,
                    "systemd keeps its back-ends' connections: {error}"
                );
            }
            // Also those that no connection was made to yet.
            program::end_of(guest.identity());
            guest.end_earlier_workers();
            self.files.remove(guest.identity());
            let deadline = Some(Instant::now() + STOP_LIMIT);
            let identity = guest.identity().clone();
            let mut workers = guest.into_workers().peekable();
            if workers.peek().is_none() {
                self.uses.end_guest(&identity);
            }
            for mut worker in workers {
                let _ = worker.conversation.send(&ToWorker::Stop, &[]);
                self.stopping.push(Stopping {
                    worker,
                    guest: identity.clone(),
                    deadline,
                });
            }
        }
    }
}
