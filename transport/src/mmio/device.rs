//! A device behind its registers: takes the driver's accesses to its host, and tells the driver what comes of them.

use super::device_state::{DeviceState, DeviceStateError};
use super::interrupt::Interrupt;
use super::register_file::RegisterFile;
use super::registers::{Location, Register, TrapCounters};
use super::report::{DeviceReport, LatencyReport, QueueReport};
use crate::host::{Host, Outcome};
use crate::hypervisor::{Hypervisor, Width};
use crate::virtio_state::Effect;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use xen_virtio_backend::{Activity, Device, Interest, LogLimit, Trace};
use xen_virtio_guest_mapping::AddressMode;

/// One virtio-mmio device of a guest.
pub struct MmioDevice {
    registers: RegisterFile,
    host: Host,
    /// What outlives this process of both.
    kept: DeviceState,
    interrupt: Interrupt,
    traps: TrapCounters,
    refused_accesses: u64,
    access_log: LogLimit,
}

impl MmioDevice {
    /// A device of the guest that `hypervisor` shows, whose driver names its memory as `mode` says, and is interrupted by the
    /// interrupt `irq`. The device goes on from `kept`: from the beginning, if nobody has driven it yet.
    ///
    /// # Errors
    ///
    /// [`DeviceStateError`] if it cannot.
    pub fn new(
        device: Box<dyn Device>,
        hypervisor: &impl Hypervisor,
        mode: AddressMode,
        irq: u32,
        kept: DeviceState,
    ) -> Result<Self, DeviceStateError> {
        let identity = device.identity().clone();
        let saved = kept.load(identity.queue_sizes.len())?;
        let (registers, state) = saved.map(RegisterFile::restore).unzip();
        let access = hypervisor.guest_access(mode);
        let (host, outcome) = Host::new(device, identity, access, mode, state, kept.journals())?;
        let mut this = Self {
            registers: registers.unwrap_or_default(),
            host,
            kept,
            interrupt: Interrupt::new(hypervisor.interrupt_line(irq)),
            traps: TrapCounters::default(),
            refused_accesses: 0,
            access_log: LogLimit::default(),
        };
        this.carry_out(outcome);
        Ok(this)
    }

    /// The driver reads `width` bytes at `offset` of the device's page.
    pub fn read(&mut self, offset: u64, width: Width) -> u64 {
        let location = Location::decode(offset, width);
        self.traps.count(location);
        match location {
            Location::Register(register) => self.registers.read(self.host.state(), register).into(),
            Location::Config(offset) => {
                let mut bytes = [0; 8];
                self.host.read_config(offset, &mut bytes[..width.bytes()]);
                u64::from_le_bytes(bytes)
            }
            Location::Nothing => {
                self.refuse("read", offset, width);
                0
            }
        }
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
                let data = value.to_le_bytes();
                self.host.write_config(offset, &data[..width.bytes()]);
                return;
            }
            Location::Nothing => Effect::Refused,
        };
        if effect == Effect::Refused {
            self.refuse("write", offset, width);
        }
    }

    fn write_register(&mut self, register: Register, value: u32) -> Effect {
        let before = self.host.state().misstep();
        let effect = self.registers.write(&mut self.host.state, register, value);
        self.host.log_misstep(before);
        if register.keeps_writes() {
            self.host.prepare(effect);
            self.save();
        }
        let outcome = self.host.perform(effect);
        self.carry_out(outcome);
        effect
    }

    fn save(&self) {
        self.kept.save(&self.registers.saved(self.host.state()));
    }

    /// Tells the driver what the host has for it.
    fn carry_out(&mut self, outcome: Outcome) {
        let Outcome {
            changed,
            used_buffers,
            configuration,
        } = outcome;
        if changed {
            self.save();
        }
        if self.registers.set_interrupt(used_buffers, configuration) {
            self.interrupt.raise();
        }
    }

    /// The device without its registers: [`Host::retire`].
    pub fn retire(self) -> Box<dyn Device> {
        self.host.retire()
    }

    /// When [`MmioDevice::step`] is to be called though nothing tells of it.
    pub fn try_again_at(&self) -> Option<Instant> {
        let times = [self.host.try_again_at(), self.interrupt.retry_at()];
        times.into_iter().flatten().min()
    }

    /// Takes a step with the queues.
    pub fn step(&mut self) -> Activity {
        self.interrupt.retry();
        let (activity, outcome) = self.host.step();
        self.carry_out(outcome);
        self.host.trace().flush();
        activity
    }

    /// See [`Host::prepare_sleep`].
    pub fn prepare_sleep(&mut self) -> Activity {
        let (activity, outcome) = self.host.prepare_sleep();
        self.carry_out(outcome);
        self.host.trace().flush();
        activity
    }

    /// See [`Host::update`].
    pub fn update(&mut self) {
        let outcome = self.host.update();
        self.carry_out(outcome);
    }

    /// Whether the driver has been interrupted and has not acknowledged it.
    pub fn awaits_handler(&self) -> bool {
        self.registers.interrupt_pending()
    }

    /// See [`Device::sources`].
    pub fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        self.host.sources(add);
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
        self.host.invalidate();
    }

    /// Who is told of each request.
    pub fn trace(&self) -> &Trace {
        self.host.trace()
    }

    /// Requests that the device has carried out, those that failed among them.
    pub fn requests(&self) -> u64 {
        self.host.device().counters().done
    }

    pub fn report(&self) -> DeviceReport {
        let (state, device) = (self.host.state(), self.host.device());
        let access = self.host.access().counters();
        let latencies = self.host.latencies();
        let queues: Vec<_> = self.host.queues_in_use().collect();
        let shown = queues.iter().take(DeviceReport::SHOWN_QUEUES);
        let requests = device.counters();
        let mut metrics = BTreeMap::new();
        device.metrics(&mut |name, value| {
            metrics.insert(name.to_owned(), value);
        });
        DeviceReport {
            device_type: state.identity().device_type.0,
            status: state.status(),
            features: state.negotiated_features(),
            queues: state.queues().count(),
            ready_queues: state.ready_queues(),
            grants_mapped: access.grants_mapped,
            frames_mapped: access.frames_mapped,
            refused_addresses: access.refused,
            copy_batches: access.copy_batches,
            copy_segments: access.copy_segments,
            copy_bytes: access.copy_bytes,
            requests: requests.done,
            request_errors: requests.failed,
            traps: self.traps.total(),
            traps_by_register: self.traps.by_register(),
            refused_accesses: self.refused_accesses,
            kicks: self.traps.of(Register::QueueNotify),
            interrupts: self.interrupt.raised(),
            latency: LatencyReport {
                counts: latencies.counts().to_vec(),
                total_ns: latencies.total().as_nanos().try_into().unwrap_or(u64::MAX),
            },
            under_way: queues.iter().map(|(.., count)| count).sum(),
            running_queues: shown.map(|queue| QueueReport::of(*queue)).collect(),
            metrics,
            failure: self.host.failure().map(str::to_owned),
            misstep: state.misstep().map(|misstep| misstep.to_string()),
            warning: self.host.warning(),
        }
    }
}
