//! A device with its state and its access to the guest: performs what the driver asks for, however that reached it.

use crate::virtio_state::{Effect, Misstep, QueueSetup, RestoreError, SavedState, VirtioState};
use std::error::Error;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use xen_virtio_backend::{
    Activity, Device, DeviceError, DeviceFailure, Identity, Interest, Latencies, LogLimit,
    QueueError, QueueIndex, QueueJournal, QueueStart, Shortage, StateArea, Step, Trace,
    with_sources,
};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};

/// Tries in a row, over some five seconds, of what fails either for the guest's fault or for want of something in dom0.
const DOUBTFUL_TRIES: u32 = 16;

/// A device, its state, and its access to the guest's memory.
pub struct Host {
    pub(crate) state: VirtioState,
    device: Box<dyn Device>,
    access: Box<dyn GuestAccess>,
    /// What each queue has taken and not given back, for the next process.
    journals: Vec<StateArea>,
    latencies: Rc<Latencies>,
    trace: Rc<Trace>,
    /// Queues that run as far as the driver knows, and that dom0 could not map yet.
    unstarted: Vec<Unstarted>,
    shortage: Shortage,
    /// The configuration may have changed since the driver has read it, and the driver is not ready to be told.
    config_changed: bool,
    failure: Option<String>,
    failure_log: LogLimit,
    misstep_log: LogLimit,
}

/// A queue that dom0 could not map yet.
struct Unstarted {
    index: QueueIndex,
    setup: QueueSetup,
    /// The last tries that may have failed for the guest's fault.
    doubts: u32,
}

/// What whoever brings the driver's accesses has to do after one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// The state changed of itself. It is to be kept before the driver is told of anything.
    pub changed: bool,
    /// The driver is to be interrupted for buffers that were used (virtio 1.3, 2.7.7.1).
    pub used_buffers: bool,
    /// The driver is to be interrupted for its configuration, or for a failure (virtio 1.3, 2.3, 2.1.2).
    pub configuration: bool,
}

impl Outcome {
    const USED_BUFFERS: Self = Self {
        changed: false,
        used_buffers: true,
        configuration: false,
    };

    fn and(self, other: Self) -> Self {
        Self {
            changed: self.changed | other.changed,
            used_buffers: self.used_buffers | other.used_buffers,
            configuration: self.configuration | other.configuration,
        }
    }
}

impl Host {
    /// A device whose driver names its memory as `mode` says, and is told that it is `identity`. It goes on from `saved`, if an
    /// earlier process has left that.
    ///
    /// # Errors
    ///
    /// [`RestoreError`] if it cannot.
    pub(crate) fn new(
        device: Box<dyn Device>,
        identity: Identity,
        access: Box<dyn GuestAccess>,
        mode: AddressMode,
        saved: Option<SavedState>,
        journals: Vec<StateArea>,
    ) -> Result<(Self, Outcome), RestoreError> {
        let required_features = match mode {
            // A driver that does not accept ACCESS_PLATFORM would send addresses that were never granted.
            AddressMode::Grants => 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM,
            AddressMode::Frames => 1 << VIRTIO_F_VERSION_1,
        };
        let goes_on = saved.is_some();
        let state = match saved {
            None => VirtioState::new(identity, required_features),
            Some(saved) => VirtioState::restore(identity, required_features, saved)?,
        };
        let mut this = Self {
            state,
            device,
            access,
            journals,
            latencies: Rc::default(),
            trace: Rc::default(),
            unstarted: Vec::new(),
            shortage: Shortage::default(),
            config_changed: false,
            failure: None,
            failure_log: LogLimit::default(),
            misstep_log: LogLimit::default(),
        };
        let outcome = match goes_on {
            true => this.go_on(),
            false => Outcome::default(),
        };
        Ok((this, outcome))
    }

    /// Goes on from the state that an earlier process left.
    fn go_on(&mut self) -> Outcome {
        if self.state.needs_reset() {
            self.failure = Some("it failed when an earlier process served it".to_owned());
            return self.tell_failure();
        }
        for (index, setup) in self.state.running_queues() {
            let started = self.start_queue(index, setup, 0);
            if self.state.needs_reset() {
                return started;
            }
        }
        self.config_changed = !self.state.is_live();
        // The last interrupts may not have been raised, or not be read. One too many does no harm.
        Outcome {
            changed: false,
            used_buffers: self.state.is_live(),
            configuration: self.state.is_live(),
        }
    }

    pub fn state(&self) -> &VirtioState {
        &self.state
    }

    /// See [`Device::read_config`].
    pub fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.device.read_config(offset, to);
    }

    /// See [`Device::write_config`].
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Before the state after `effect` is kept: from then on the journal is what the queue goes on from.
    pub(crate) fn prepare(&mut self, effect: Effect) {
        if let Effect::StartQueue(index, setup) = effect {
            self.journal(index).clear(setup.layout.size);
        }
    }

    fn journal(&self, index: QueueIndex) -> QueueJournal {
        QueueJournal::new(self.journals[index.get()].clone())
    }

    /// Performs what an access of the driver asks for, whose state is kept.
    pub(crate) fn perform(&mut self, effect: Effect) -> Outcome {
        match effect {
            Effect::Nothing | Effect::Refused => Outcome::default(),
            // The queues are looked at after it, and when the driver is ready: `step`.
            Effect::Notify(index) => {
                self.device.kick(index);
                Outcome::default()
            }
            Effect::DriverOk => Outcome {
                configuration: std::mem::take(&mut self.config_changed),
                ..Outcome::default()
            }
            .and(self.tell_failure()),
            Effect::StartQueue(index, setup) => self.start_queue(index, setup, 0),
            Effect::StopQueue(index) => {
                self.stop_queue(index);
                Outcome::default()
            }
            Effect::Reset => {
                self.stop_queues();
                self.device.reset();
                self.config_changed = false;
                self.access.invalidate();
                self.failure = None;
                Outcome::default()
            }
        }
    }

    /// Logs what keeps the driver from getting on, if that is another thing than `before`.
    pub(crate) fn log_misstep(&mut self, before: Option<Misstep>) {
        if let Some(misstep) = self.state.misstep()
            && Some(misstep) != before
            && self.misstep_log.allow()
        {
            tracing::info!("the guest's driver does not get on: {misstep}");
        }
    }

    /// Starts a queue, after `doubts` tries that may have failed for the guest's fault.
    fn start_queue(&mut self, index: QueueIndex, setup: QueueSetup, doubts: u32) -> Outcome {
        let mut started = self.map_queue(index, setup);
        if started.as_ref().is_err_and(QueueError::is_dom0s) && self.access.make_room() {
            started = self.map_queue(index, setup);
        }
        match started {
            Ok(()) => Outcome::default(),
            Err(error)
                if error.is_dom0s() || (error.may_be_dom0s() && doubts + 1 < DOUBTFUL_TRIES) =>
            {
                // What dom0 lacked for certain says nothing of the guest.
                let doubts = if error.is_dom0s() { 0 } else { doubts + 1 };
                let error = DeviceFailure::from(error).of(index.get());
                let what = Box::<dyn Error>::from(with_sources(&error));
                self.shortage
                    .note("starting a queue", &*what, Instant::now());
                self.unstarted.push(Unstarted {
                    index,
                    setup,
                    doubts,
                });
                Outcome::default()
            }
            Err(error) => self.fail(&DeviceFailure::from(error).of(index.get())),
        }
    }

    fn map_queue(&mut self, index: QueueIndex, setup: QueueSetup) -> Result<(), QueueError> {
        let QueueSetup { layout, features } = setup;
        let start = QueueStart {
            layout,
            features,
            journal: self.journal(index),
            latencies: Rc::clone(&self.latencies),
            trace: Rc::clone(&self.trace),
        };
        self.device.start_queue(index, start, &mut *self.access)
    }

    /// Starts the queues that dom0 could not map before.
    fn start_missed_queues(&mut self) -> Outcome {
        if self.unstarted.is_empty() || self.shortage.holds() {
            return Outcome::default();
        }
        for unstarted in std::mem::take(&mut self.unstarted) {
            let Unstarted {
                index,
                setup,
                doubts,
            } = unstarted;
            let started = self.start_queue(index, setup, doubts);
            if self.state.needs_reset() {
                return started;
            }
        }
        if self.unstarted.is_empty() {
            self.shortage.end();
        }
        // What an earlier process completed may have been shown just now. One too many does no harm.
        match self.state.is_live() {
            true => Outcome::USED_BUFFERS,
            false => Outcome::default(),
        }
    }

    /// See [`Device::close_queue`].
    pub(crate) fn close_queue(&mut self, index: QueueIndex) {
        self.device.close_queue(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.unstarted.retain(|other| other.index != index);
        if self.unstarted.is_empty() {
            self.shortage.forget();
        }
        self.device.stop_queue(index);
    }

    fn stop_queues(&mut self) {
        for index in self.state.queues() {
            self.stop_queue(index);
        }
    }

    /// The device without its state, of which transfers may be under way still ([`Device::settle`]). Nothing of the guest is
    /// mapped for it any more.
    pub fn retire(mut self) -> Box<dyn Device> {
        self.stop_queues();
        self.device.retire();
        self.device
    }

    /// When [`Host::step`] is to be called though nothing tells of it.
    pub fn try_again_at(&self) -> Option<Instant> {
        let times = [self.shortage.try_at(), self.device.try_again_at()];
        times.into_iter().flatten().min()
    }

    /// Takes a step with the queues.
    pub fn step(&mut self) -> (Activity, Outcome) {
        let started = self.start_missed_queues();
        if !self.state.is_live() {
            // What an earlier driver has left is none of the next one's.
            self.device.settle();
            return (Activity::Idle, started);
        }
        let step = self.device.step(&mut *self.access);
        let (activity, outcome) = self.take(step);
        (activity, started.and(outcome))
    }

    /// Prepares for nobody calling [`Host::step`] until the driver accesses the device, or one of [`Host::sources`] is ready.
    pub fn prepare_sleep(&mut self) -> (Activity, Outcome) {
        if !self.state.is_live() {
            return (Activity::Idle, Outcome::default());
        }
        let step = self.device.prepare_sleep(&mut *self.access);
        self.take(step)
    }

    fn take(&mut self, step: Result<Step, DeviceError>) -> (Activity, Outcome) {
        match step {
            Ok(Step {
                interrupt,
                config_changed,
                activity,
            }) => {
                let used = Outcome {
                    used_buffers: interrupt,
                    ..Outcome::default()
                };
                match config_changed {
                    true => (activity, used.and(self.change_configuration())),
                    false => (activity, used),
                }
            }
            Err(error) => (Activity::Idle, self.fail(&error)),
        }
    }

    /// Has the device take up what was changed of it from outside; the driver is to be told (virtio 1.3, 2.5).
    pub fn update(&mut self) -> Outcome {
        match self.device.update() {
            true => self.change_configuration(),
            false => Outcome::default(),
        }
    }

    fn change_configuration(&mut self) -> Outcome {
        self.state.change_configuration();
        let live = self.state.is_live();
        self.config_changed |= !live;
        Outcome {
            changed: true,
            used_buffers: false,
            configuration: live,
        }
    }

    /// See [`Device::sources`].
    pub fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        self.device.sources(add);
    }

    /// Stops the device until its driver resets it (virtio 1.3, 2.1.2).
    fn fail(&mut self, error: &DeviceError) -> Outcome {
        let failure = with_sources(error);
        if self.failure_log.allow() {
            tracing::warn!("the guest's driver must reset this device: {failure}");
        }
        self.failure = Some(failure);
        self.stop_queues();
        self.state.set_needs_reset();
        Outcome {
            changed: true,
            ..self.tell_failure()
        }
    }

    /// Has the driver told of a failure, if there was one, and the driver is ready to be told.
    fn tell_failure(&self) -> Outcome {
        let tell = self.state.must_tell_failure();
        Outcome {
            changed: false,
            // What was completed before the failure may not have been told yet.
            used_buffers: tell,
            configuration: tell,
        }
    }

    /// The guest's memory map changed.
    pub fn invalidate(&mut self) {
        self.access.invalidate();
    }

    pub(crate) fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// How long the device's requests have taken.
    pub(crate) fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// Who is told of each request.
    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The queues that run as far as the driver knows, with how many requests of each are with the device.
    pub(crate) fn queues_in_use(&self) -> impl Iterator<Item = (QueueIndex, QueueSetup, u64)> {
        self.state
            .running_queues()
            .into_iter()
            .map(|(index, setup)| {
                let under_way = self.journal(index).under_way(setup.layout.size);
                (index, setup, under_way as u64)
            })
    }

    pub(crate) fn access(&self) -> &dyn GuestAccess {
        &*self.access
    }

    /// Why the device needs a reset, until it gets one.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// What whoever looks after the device should know, though it works.
    pub fn warning(&self) -> Option<String> {
        self.shortage.warning().or_else(|| self.device.warning())
    }
}
