//! A device behind its registers: performs what the driver's accesses ask for.

use crate::device_state::{DeviceState, DeviceStateError};
use crate::hypervisor::{Hypervisor, Width};
use crate::interrupt::{Cause, Interrupt};
use crate::register_file::RegisterFile;
use crate::registers::{Location, Register, TrapCounters};
use crate::virtio_state::{Effect, QueueSetup, VirtioState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use xen_virtio_backend::{
    Activity, Device, DeviceError, DeviceFailure, Interest, LogLimit, QueueError, QueueIndex,
    QueueStart, Shortage, Step,
};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};

/// Tries, over some five seconds, of what fails either for the guest's fault or for want of something in dom0.
const DOUBTFUL_TRIES: u32 = 16;

/// One virtio-mmio device of a guest.
pub struct MmioDevice {
    registers: RegisterFile,
    state: DeviceState,
    device: Box<dyn Device>,
    access: Box<dyn GuestAccess>,
    interrupt: Interrupt,
    /// Queues that run as far as the driver knows, and that dom0 could not map yet.
    unstarted: Vec<(QueueIndex, QueueSetup)>,
    shortage: Shortage,
    /// The configuration may have changed since the driver has read it, and the driver is not ready to be told.
    config_changed: bool,
    failure: Option<String>,
    traps: TrapCounters,
    refused_accesses: u64,
    failure_log: LogLimit,
    misstep_log: LogLimit,
    access_log: LogLimit,
}

/// What [`MmioDevice::report`] tells of a device, in plain numbers, for `xen-virtioctl`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub device_type: u32,
    /// The status register (virtio 1.3, 2.1).
    pub status: u32,
    pub features: u64,
    pub queues: usize,
    pub ready_queues: usize,
    pub grants_mapped: u64,
    pub frames_mapped: u64,
    pub refused_addresses: u64,
    pub copy_batches: u64,
    pub copy_segments: u64,
    pub copy_bytes: u64,
    pub requests: u64,
    pub request_errors: u64,
    pub traps: u64,
    /// The traps by register; the configuration space is one.
    pub traps_by_register: BTreeMap<String, u64>,
    pub refused_accesses: u64,
    pub kicks: u64,
    pub interrupts: u64,
    /// What a device of its kind counts besides, by name ([`Device::metrics`]).
    #[serde(default)]
    pub metrics: BTreeMap<String, u64>,
    /// Why the device needs a reset, until it gets one.
    pub failure: Option<String>,
    /// What kept the driver from getting on, by its own doing.
    #[serde(default)]
    pub misstep: Option<String>,
    /// What whoever looks after the device should know, though it works.
    #[serde(default)]
    pub warning: Option<String>,
}

impl MmioDevice {
    /// A device of the guest that `hypervisor` shows, whose driver names its memory as `mode` says, and is interrupted by the
    /// interrupt `irq`. The device goes on from `state`: from the beginning, if nobody has driven it yet.
    ///
    /// # Errors
    ///
    /// [`DeviceStateError`] if it cannot.
    pub fn new(
        device: Box<dyn Device>,
        hypervisor: &impl Hypervisor,
        mode: AddressMode,
        irq: u32,
        state: DeviceState,
    ) -> Result<Self, DeviceStateError> {
        let required_features = match mode {
            // A driver that does not accept ACCESS_PLATFORM would send addresses that were never granted.
            AddressMode::Grants => 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM,
            AddressMode::Frames => 1 << VIRTIO_F_VERSION_1,
        };
        let identity = device.identity().clone();
        let known = state.load(identity.queue_sizes.len())?;
        let mut this = Self {
            registers: RegisterFile::new(VirtioState::new(identity.clone(), required_features)),
            state,
            device,
            access: hypervisor.guest_access(mode),
            interrupt: Interrupt::new(hypervisor.interrupt_line(irq)),
            unstarted: Vec::new(),
            shortage: Shortage::default(),
            config_changed: false,
            failure: None,
            traps: TrapCounters::default(),
            refused_accesses: 0,
            failure_log: LogLimit::default(),
            misstep_log: LogLimit::default(),
            access_log: LogLimit::default(),
        };
        if let Some(set) = known {
            this.registers = RegisterFile::restore(identity, required_features, set)?;
            this.go_on();
        }
        Ok(this)
    }

    /// Goes on from registers that an earlier process left.
    fn go_on(&mut self) {
        if self.registers.state().needs_reset() {
            self.failure = Some("it failed when an earlier process served it".to_owned());
            self.tell_failure();
            return;
        }
        for (index, setup) in self.registers.state().running_queues() {
            self.start_queue(index, setup);
            if self.registers.state().needs_reset() {
                return;
            }
        }
        if self.registers.state().is_live() {
            // The last ones may not have been raised, or not be read. One too many does no harm.
            self.registers.set_interrupt(Cause::UsedBuffer);
            self.interrupt
                .raise(Cause::Configuration, &mut self.registers);
        } else {
            self.config_changed = true;
        }
    }

    /// The driver reads `width` bytes at `offset` of the device's page.
    pub fn read(&mut self, offset: u64, width: Width) -> u64 {
        let location = Location::decode(offset, width);
        self.traps.count(location);
        match location {
            Location::Register(register) => self.registers.read(register).into(),
            Location::Config(offset) => self.read_config(offset, width),
            Location::Nothing => {
                self.refuse("read", offset, width);
                0
            }
        }
    }

    fn read_config(&self, offset: usize, width: Width) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(offset, &mut bytes[..width.bytes()]);
        u64::from_le_bytes(bytes)
    }

    /// The driver writes the low `width` bytes of `value` at `offset` of the device's page.
    pub fn write(&mut self, offset: u64, width: Width, value: u64) {
        let location = Location::decode(offset, width);
        self.traps.count(location);
        let effect = match location {
            Location::Register(register) => {
                let value = u32::try_from(value & u64::from(u32::MAX)).expect("32 bits");
                self.write_register(register, value)
            }
            Location::Config(offset) => {
                self.device
                    .write_config(offset, &value.to_le_bytes()[..width.bytes()]);
                return;
            }
            Location::Nothing => Effect::Refused,
        };
        if effect == Effect::Refused {
            self.refuse("write", offset, width);
        }
    }

    fn write_register(&mut self, register: Register, value: u32) -> Effect {
        let before = self.registers.state().misstep();
        let effect = self.registers.write(register, value);
        if let Some(misstep) = self
            .registers
            .state()
            .misstep()
            .filter(|now| Some(*now) != before)
            && self.misstep_log.allow()
        {
            tracing::info!("the guest's driver does not get on: {misstep}");
        }
        if let Effect::StartQueue(index, setup) = effect {
            // Before the registers say that it runs: from then on the journal is what it goes on from.
            self.state.journal(index).clear(setup.layout.size);
        }
        if register.keeps_writes() {
            self.state.save(&self.registers.saved());
        }
        match effect {
            Effect::Nothing | Effect::Refused => {}
            // The queues are looked at after it, and when the driver is ready: `step`.
            Effect::Notify(index) => self.device.kick(index),
            Effect::DriverOk => {
                self.tell_failure();
                if std::mem::take(&mut self.config_changed) {
                    self.interrupt
                        .raise(Cause::Configuration, &mut self.registers);
                }
            }
            Effect::StartQueue(index, setup) => self.start_queue(index, setup),
            Effect::StopQueue(index) => self.stop_queue(index),
            Effect::Reset => {
                self.stop_queues();
                self.device.reset();
                self.config_changed = false;
                self.access.invalidate();
                self.failure = None;
            }
        }
        effect
    }

    fn start_queue(&mut self, index: QueueIndex, setup: QueueSetup) {
        let mut started = self.map_queue(index, setup);
        if started.as_ref().is_err_and(QueueError::is_dom0s) && self.access.make_room() {
            started = self.map_queue(index, setup);
        }
        match started {
            Ok(()) => {}
            Err(error)
                if error.is_dom0s()
                    || (error.may_be_dom0s() && self.shortage.tries() < DOUBTFUL_TRIES) =>
            {
                let error = DeviceFailure::from(error).of(index.get());
                let what = Box::<dyn Error>::from(with_sources(&error));
                self.shortage
                    .note("starting a queue", &*what, Instant::now());
                self.unstarted.push((index, setup));
            }
            Err(error) => self.fail(&DeviceFailure::from(error).of(index.get())),
        }
    }

    fn map_queue(&mut self, index: QueueIndex, setup: QueueSetup) -> Result<(), QueueError> {
        let QueueSetup { layout, features } = setup;
        let start = QueueStart {
            layout,
            features,
            journal: self.state.journal(index),
        };
        self.device.start_queue(index, start, &mut *self.access)
    }

    /// Starts the queues that dom0 could not map before.
    fn start_missed_queues(&mut self) {
        if self.unstarted.is_empty() || self.shortage.holds() {
            return;
        }
        for (index, setup) in std::mem::take(&mut self.unstarted) {
            self.start_queue(index, setup);
            if self.registers.state().needs_reset() {
                return;
            }
        }
        if self.unstarted.is_empty() {
            self.shortage.end();
        }
        if self.registers.state().is_live() {
            // What an earlier process completed may have been shown just now. One too many does no harm.
            self.interrupt.raise(Cause::UsedBuffer, &mut self.registers);
        }
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.unstarted.retain(|(other, _)| *other != index);
        if self.unstarted.is_empty() {
            self.shortage.forget();
        }
        self.device.stop_queue(index);
    }

    fn stop_queues(&mut self) {
        for index in self.registers.state().queues() {
            self.stop_queue(index);
        }
    }

    /// The device without its registers, of which transfers may be under way still ([`Device::settle`]). Nothing of the
    /// guest is mapped for it any more.
    pub fn retire(mut self) -> Box<dyn Device> {
        self.stop_queues();
        self.device.retire();
        self.device
    }

    /// When [`MmioDevice::step`] is to be called though nothing tells of it.
    pub fn try_again_at(&self) -> Option<Instant> {
        [
            self.shortage.try_at(),
            self.device.try_again_at(),
            self.interrupt.retry_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes a step with the queues.
    pub fn step(&mut self) -> Activity {
        self.interrupt.retry();
        self.start_missed_queues();
        if !self.registers.state().is_live() {
            // What an earlier driver has left is none of the next one's.
            self.device.settle();
            return Activity::Idle;
        }
        let step = self.device.step(&mut *self.access);
        self.take(step)
    }

    /// Prepares for nobody calling [`MmioDevice::step`] until there is a trap, or one of [`MmioDevice::sources`] is
    /// ready.
    pub fn prepare_sleep(&mut self) -> Activity {
        if !self.registers.state().is_live() {
            return Activity::Idle;
        }
        let step = self.device.prepare_sleep(&mut *self.access);
        self.take(step)
    }

    fn take(&mut self, step: Result<Step, DeviceError>) -> Activity {
        match step {
            Ok(Step {
                interrupt,
                config_changed,
                activity,
            }) => {
                if interrupt {
                    self.interrupt.raise(Cause::UsedBuffer, &mut self.registers);
                }
                if config_changed {
                    self.change_configuration();
                }
                activity
            }
            Err(error) => {
                self.fail(&error);
                Activity::Idle
            }
        }
    }

    /// Has the device take up what was changed of it from outside, and tells the driver (virtio 1.3, 2.5).
    pub fn update(&mut self) {
        if self.device.update() {
            self.change_configuration();
        }
    }

    fn change_configuration(&mut self) {
        self.registers.state_mut().change_configuration();
        self.state.save(&self.registers.saved());
        if self.registers.state().is_live() {
            self.interrupt
                .raise(Cause::Configuration, &mut self.registers);
        } else {
            self.config_changed = true;
        }
    }

    /// Whether the driver has been interrupted and has not acknowledged it.
    pub fn awaits_handler(&self) -> bool {
        self.registers.interrupt_pending()
    }

    /// See [`Device::sources`].
    pub fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        self.device.sources(add);
    }

    /// Stops the device until its driver resets it, and tells the driver (virtio 1.3, 2.1.2).
    fn fail(&mut self, error: &DeviceError) {
        let failure = with_sources(error);
        if self.failure_log.allow() {
            tracing::warn!("the guest's driver must reset this device: {failure}");
        }
        self.failure = Some(failure);
        self.stop_queues();
        self.registers.state_mut().set_needs_reset();
        self.state.save(&self.registers.saved());
        self.tell_failure();
    }

    /// Interrupts the driver for a failure, if there was one, and the driver is ready to be told.
    fn tell_failure(&mut self) {
        if self.registers.state().must_tell_failure() {
            // What was completed before the failure may not have been told yet.
            self.registers.set_interrupt(Cause::UsedBuffer);
            self.interrupt
                .raise(Cause::Configuration, &mut self.registers);
        }
    }

    fn refuse(&mut self, what: &str, offset: u64, width: Width) {
        self.refused_accesses += 1;
        if self.access_log.allow() {
            tracing::debug!(
                "the guest's {}-byte {what} at {offset:#x} has no effect",
                width.bytes()
            );
        }
    }

    /// The guest's memory map changed.
    pub fn invalidate(&mut self) {
        self.access.invalidate();
    }

    pub fn report(&self) -> DeviceReport {
        let access = self.access.counters();
        let device = self.device.counters();
        let mut metrics = BTreeMap::new();
        self.device.metrics(&mut |name, value| {
            metrics.insert(name.to_owned(), value);
        });
        DeviceReport {
            device_type: self.device.identity().device_type.0,
            status: self.registers.state().status(),
            features: self.registers.state().negotiated_features(),
            queues: self.registers.state().queues().count(),
            ready_queues: self.registers.state().ready_queues(),
            grants_mapped: access.grants_mapped,
            frames_mapped: access.frames_mapped,
            refused_addresses: access.refused,
            copy_batches: access.copy_batches,
            copy_segments: access.copy_segments,
            copy_bytes: access.copy_bytes,
            requests: device.done,
            request_errors: device.failed,
            traps: self.traps.total(),
            traps_by_register: self.traps.by_register(),
            refused_accesses: self.refused_accesses,
            kicks: self.traps.of(Register::QueueNotify),
            interrupts: self.interrupt.raised(),
            metrics,
            failure: self.failure.clone(),
            warning: self.shortage.warning().or_else(|| self.device.warning()),
            misstep: self
                .registers
                .state()
                .misstep()
                .map(|misstep| misstep.to_string()),
        }
    }
}

/// An error and what it came from, on one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    line
}
