//! The device, and its queues as the VMM has set them up.

use super::events::Events;
use super::vring::{Vring, tell};
use crate::host::{Host, Outcome};
use crate::virtio_state::{Effect, VirtioState, high, low};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use xen_virtio_backend::tuning::SHORTEST_SLEEP;
use xen_virtio_backend::{
    Activity, Device, Identity, MAX_QUEUE_SIZE, QueueIndex, QueueJournal, StateArea,
};
use xen_virtio_guest_mapping::owned::OwnedMemory;
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};

/// How long what was taken of a queue may take to end, before the VMM is told that it cannot have the queue back.
const ENDING: Duration = Duration::from_secs(30);

const NEGOTIATED: u32 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;

pub(super) struct Served {
    pub(super) host: Host,
    pub(super) memory: OwnedMemory,
    pub(super) vrings: Vec<Vring>,
    /// Queues begin enabled (`VHOST_USER_F_PROTOCOL_FEATURES` was not accepted).
    pub(super) are_enabled: bool,
    journals: Vec<StateArea>,
    events: Events,
}

impl Served {
    pub(super) fn new(device: Box<dyn Device>) -> io::Result<Self> {
        // No message says how large a queue may be: a VMM has a size of its own.
        let sizes = vec![MAX_QUEUE_SIZE; device.identity().queue_sizes.len()];
        let identity = Identity {
            queue_sizes: sizes.clone(),
            ..device.identity().clone()
        };
        let journals = sizes
            .iter()
            .map(|size| StateArea::private(QueueJournal::bytes(*size)));
        let journals: Vec<_> = journals.collect::<io::Result<_>>()?;
        let memory = OwnedMemory::default();
        let access: Box<dyn GuestAccess> = Box::new(memory.access());
        let mode = AddressMode::Frames;
        let host = Host::new(device, identity, access, mode, None, journals.clone());
        let (host, _) = host.map_err(io::Error::other)?;
        let events = Events::new()?;
        let mut added = Ok(());
        host.sources(&mut |source, interest| {
            if added.is_ok() {
                added = events.add_device(source, interest);
            }
        });
        added?;
        Ok(Self {
            host,
            memory,
            vrings: sizes.iter().map(|_| Vring::default()).collect(),
            are_enabled: false,
            journals,
            events,
        })
    }

    /// Goes on with the VMM at the other end of `socket`.
    pub(super) fn hear(&mut self, socket: UnixStream) -> io::Result<()> {
        self.events.hear(Some(socket))
    }

    /// As if nobody had been there.
    pub(super) fn begin_anew(&mut self) {
        self.reset();
        self.vrings.fill_with(Vring::default);
        let forgotten = self.memory.set(Vec::new());
        forgotten.expect("no region, none that is wrong");
        // An error means that it was not watched.
        let _ = self.events.hear(None);
    }

    /// The queue of this number.
    pub(super) fn index(&self, number: u32) -> Option<QueueIndex> {
        QueueIndex::new(number, self.vrings.len())
    }

    fn journal(&self, index: QueueIndex) -> QueueJournal {
        QueueJournal::new(self.journals[index.get()].clone())
    }

    pub(super) fn reset(&mut self) {
        for index in self.host.state.queues() {
            self.forget(index);
        }
        let effect = self.host.state.set_status(0);
        self.perform(effect);
    }

    /// The queue is stopped: the VMM gives new descriptors when it starts it again.
    fn forget(&mut self, index: QueueIndex) {
        let vring = &mut self.vrings[index.get()];
        vring.is_started = false;
        self.set_kick(index, None);
        self.vrings[index.get()].call = None;
    }

    /// Performs what the VMM asks for.
    fn perform(&mut self, effect: Effect) {
        let outcome = self.host.perform(effect);
        self.take(outcome);
    }

    /// Tells the VMM what has come of something.
    fn take(&self, outcome: Outcome) {
        let Outcome {
            changed: _,
            used_buffers,
            configuration,
        } = outcome;
        for vring in self.vrings.iter().filter(|vring| vring.is_started) {
            if used_buffers {
                tell(vring.call.as_ref());
            }
            // The configuration of what is served so does not change: the device has failed.
            if configuration {
                tell(vring.error.as_ref());
            }
        }
    }

    /// The driver has accepted `features`. False if it may not have.
    pub(super) fn accept(&mut self, features: u64) -> bool {
        let has_accepted = |state: &VirtioState| {
            state.status() & VIRTIO_CONFIG_S_FEATURES_OK != 0
                && state.negotiated_features() == features
        };
        if has_accepted(&self.host.state) && !self.host.state.needs_reset() {
            return true;
        }
        self.reset();
        let state = &mut self.host.state;
        for (word, value) in [(0, low(features)), (1, high(features))] {
            let effect = state.accept_features(word, value);
            debug_assert_eq!(effect, Effect::Nothing, "after a reset");
        }
        let effect = state.set_status(NEGOTIATED);
        self.perform(effect);
        has_accepted(&self.host.state)
    }

    /// Kicks of a queue come from `kick` from now on.
    pub(super) fn set_kick(&mut self, index: QueueIndex, kick: Option<File>) {
        let vring = &mut self.vrings[index.get()];
        if let Some(before) = std::mem::replace(&mut vring.kick, kick) {
            self.events.remove(before.as_fd());
        }
    }

    /// Starts a queue, if all is known that it takes.
    pub(super) fn start(&mut self, index: QueueIndex) -> io::Result<()> {
        let vring = &mut self.vrings[index.get()];
        let Some(areas) = vring.complete() else {
            return Ok(());
        };
        if let Some(kick) = &vring.kick {
            let number = u32::try_from(index.get()).expect("few queues");
            self.events.add_kick(kick.as_fd(), number)?;
        }
        vring.is_started = true;
        let (size, base) = (vring.size, vring.base);
        let state = &mut self.host.state;
        let set = state.set_queue(index, |queue| {
            queue.size = size.into();
            queue.descriptors = areas.descriptors.0;
            queue.available = areas.available.0;
            queue.used = areas.used.0;
        });
        debug_assert_eq!(set, Effect::Nothing, "a queue that is stopped");
        let effect = state.set_queue_ready(index, 1);
        self.host.prepare(effect);
        self.journal(index).publish(base.into());
        self.perform(effect);
        let ready = NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK;
        let effect = self.host.state.set_status(ready);
        self.perform(effect);
        Ok(())
    }

    /// Stops a queue as [`Served::pause`] does, and forgets how it was kicked: the VMM says that anew when it starts it again.
    pub(super) fn stop(&mut self, index: QueueIndex) -> io::Result<Option<u16>> {
        let next = self.pause(index)?;
        if next.is_some() {
            self.forget(index);
        }
        Ok(next)
    }

    /// Stops a queue when all that was taken of it has ended; the element with which both rings would go on. Nothing if it has
    /// not ended in time.
    pub(super) fn pause(&mut self, index: QueueIndex) -> io::Result<Option<u16>> {
        let Vring {
            is_started,
            base,
            size,
            ..
        } = self.vrings[index.get()];
        if !is_started {
            return Ok(Some(base));
        }
        self.host.close_queue(index);
        self.events.listen(false)?;
        let next = self.end_requests(index, size);
        self.events.listen(true)?;
        let Some(next) = next? else {
            return Ok(None);
        };
        let effect = self.host.state.set_queue_ready(index, 0);
        self.perform(effect);
        let vring = &mut self.vrings[index.get()];
        vring.is_started = false;
        vring.base = next;
        if let Some(kick) = &vring.kick {
            self.events.remove(kick.as_fd());
        }
        Ok(Some(next))
    }

    fn end_requests(&mut self, index: QueueIndex, size: u16) -> io::Result<Option<u16>> {
        let until = Instant::now() + ENDING;
        loop {
            self.work();
            let positions = self.journal(index).positions(size);
            // Of a device that has failed nothing ends any more.
            if let Some((next, is_settled)) = positions
                && (is_settled || self.host.state.needs_reset())
            {
                return Ok(Some(next));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            self.events.wait(Some(self.look_at(until)))?;
        }
    }

    /// When to look again, at `until` at the latest.
    fn look_at(&self, until: Instant) -> Instant {
        let again = self.host.try_again_at();
        let soon = Instant::now() + SHORTEST_SLEEP;
        again.map_or(until, |at| at.max(soon).min(until))
    }

    /// Does what there is to do, and waits for more; whether the VMM has said something.
    pub(super) fn go_on(&mut self) -> io::Result<bool> {
        let until = match self.work() {
            Activity::Working => Some(Instant::now()),
            Activity::Waiting | Activity::Idle => {
                let soon = Instant::now() + SHORTEST_SLEEP;
                self.host.try_again_at().map(|at| at.max(soon))
            }
        };
        let ready = self.events.wait(until)?;
        for number in ready.kicks {
            let effect = self.host.state.notify(number);
            self.perform(effect);
        }
        Ok(ready.socket)
    }

    fn work(&mut self) -> Activity {
        let (mut activity, outcome) = self.host.step();
        self.take(outcome);
        if activity < Activity::Working {
            let (asleep, outcome) = self.host.prepare_sleep();
            self.take(outcome);
            activity = activity.max(asleep);
        }
        activity
    }
}
