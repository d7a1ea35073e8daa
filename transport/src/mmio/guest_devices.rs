//! One guest: its devices, and the loop body that serves them.

use super::device::MmioDevice;
use super::device_state::DeviceState;
use super::handler_wait::{Access, HandlerWait};
use super::register_file::{MAGIC, VERSION};
use super::registers::{Location, Register};
use crate::hypervisor::{Hypervisor, MmioRange, TrapRequest, Width};
use std::io;
use std::time::{Duration, Instant};
use xen_virtio_backend::tuning::{HANDLER_LIMIT, HANDLER_LOOKS, TRAPS_PER_STEP};
use xen_virtio_backend::{Activity, Device};

/// What a handler does: it reads why it was called, and acknowledges that (virtio 1.3, 4.2.2.2).
const HANDLER_ACCESSES: usize = 2;

/// Why a device cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error(
        "the pages {base:#x}+{len:#x} of the device overlap those of another device of the guest"
    )]
    Overlap { base: u64, len: u64 },
    #[error("the guest's accesses to {base:#x}+{len:#x} cannot be claimed from Xen")]
    Claim {
        base: u64,
        len: u64,
        source: io::Error,
    },
}

/// Names a device of a [`GuestDevices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(usize);

/// What answers for a claimed range. Claims outlive their devices: an access that nobody answers would end in
/// a data abort in the guest.
enum RangeOwner {
    Device(Box<MmioDevice>),
    /// The guest has a device here that cannot be served now, with these registers: the driver goes on from
    /// there whenever the device is back. Reads are zero. A driver that resets the device, stops a queue or
    /// begins to look for it anew has its memory for itself again, and the device comes back as after a reset.
    Missing(DeviceState),
    /// No device, in a place where one can be: a placeholder (virtio 1.3, 4.2.2), which drivers pass by.
    Nothing,
}

impl RangeOwner {
    fn device(&self) -> Option<&MmioDevice> {
        match self {
            Self::Device(device) => Some(device),
            Self::Missing(_) | Self::Nothing => None,
        }
    }

    fn device_mut(&mut self) -> Option<&mut MmioDevice> {
        match self {
            Self::Device(device) => Some(device),
            Self::Missing(_) | Self::Nothing => None,
        }
    }

    fn read(&mut self, offset: u64, width: Width) -> u64 {
        match self {
            Self::Device(device) => return device.read(offset, width),
            Self::Missing(state) => {
                // A driver looks there when it knows nothing of the device yet (virtio 1.3, 4.2.3.1.1).
                if is_at(Register::MagicValue, offset, width) {
                    state.clear();
                }
            }
            // Its device type is 0.
            Self::Nothing if is_at(Register::MagicValue, offset, width) => return MAGIC.into(),
            Self::Nothing if is_at(Register::Version, offset, width) => return VERSION.into(),
            Self::Nothing => {}
        }
        0
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        match self {
            Self::Device(device) => device.write(offset, width, value),
            Self::Missing(state) => {
                let ends = [Register::Status, Register::QueueReady]
                    .into_iter()
                    .any(|register| is_at(register, offset, width));
                if ends && value & u64::from(u32::MAX) == 0 {
                    state.clear();
                }
            }
            Self::Nothing => {}
        }
    }
}

fn is_at(register: Register, offset: u64, width: Width) -> bool {
    Location::decode(offset, width) == Location::Register(register)
}

/// A guest and its devices.
pub struct GuestDevices<H> {
    hypervisor: H,
    slots: Vec<(MmioRange, RangeOwner)>,
    handler: HandlerWait,
}

impl<H: Hypervisor> GuestDevices<H> {
    pub fn new(hypervisor: H) -> Self {
        Self {
            hypervisor,
            slots: Vec::new(),
            handler: HandlerWait::default(),
        }
    }

    pub fn hypervisor(&mut self) -> &mut H {
        &mut self.hypervisor
    }

    /// Claims `range` for `device`.
    ///
    /// # Errors
    ///
    /// [`DevicesError`], with nothing changed.
    pub fn add(&mut self, range: MmioRange, device: MmioDevice) -> Result<Slot, DevicesError> {
        self.put(range, RangeOwner::Device(Box::new(device)))
    }

    /// Claims `range` for a device that the guest knows, and that has to wait with its registers in `state`.
    ///
    /// # Errors
    ///
    /// [`DevicesError`], with nothing changed.
    pub fn add_missing(
        &mut self,
        range: MmioRange,
        state: DeviceState,
    ) -> Result<Slot, DevicesError> {
        self.put(range, RangeOwner::Missing(state))
    }

    /// Claims `range`, where the guest finds no device until one is added; one that is there already stays.
    ///
    /// # Errors
    ///
    /// [`DevicesError`], with nothing changed.
    pub fn claim(&mut self, range: MmioRange) -> Result<(), DevicesError> {
        if self.slots.iter().any(|(other, _)| *other == range) {
            return Ok(());
        }
        self.put(range, RangeOwner::Nothing).map(drop)
    }

    fn put(&mut self, range: MmioRange, owner: RangeOwner) -> Result<Slot, DevicesError> {
        let MmioRange { base, len } = range;
        let vacant = |(other, owner): &(_, RangeOwner)| *other == range && owner.device().is_none();
        if let Some(slot) = self.slots.iter().position(vacant) {
            // Claimed for the device that was here before.
            self.slots[slot].1 = owner;
            return Ok(Slot(slot));
        }
        if self.slots.iter().any(|(other, _)| other.overlaps(&range)) {
            return Err(DevicesError::Overlap { base, len });
        }
        self.hypervisor
            .claim(range)
            .map_err(|source| DevicesError::Claim { base, len, source })?;
        self.slots.push((range, owner));
        Ok(Slot(self.slots.len() - 1))
    }

    /// Takes a device away, if there is one: [`MmioDevice::retire`]. Its driver finds no device there from now on.
    pub fn remove(&mut self, Slot(slot): Slot) -> Option<Box<dyn Device>> {
        match std::mem::replace(&mut self.slots[slot].1, RangeOwner::Nothing) {
            RangeOwner::Device(device) => Some(device.retire()),
            RangeOwner::Missing(_) | RangeOwner::Nothing => None,
        }
    }

    /// A device, unless it was removed.
    pub fn device(&self, Slot(slot): Slot) -> Option<&MmioDevice> {
        self.slots[slot].1.device()
    }

    /// As [`GuestDevices::device`], to be changed.
    pub fn device_mut(&mut self, Slot(slot): Slot) -> Option<&mut MmioDevice> {
        self.slots[slot].1.device_mut()
    }

    /// Answers the traps that wait, and those of an interrupt handler that is about to come; then has
    /// each device take a step.
    pub fn step(&mut self) -> Activity {
        let mut activity = Activity::Idle;
        let mut waits = 0;
        for _ in 0..TRAPS_PER_STEP {
            if !self.answer_trap() {
                if waits == HANDLER_ACCESSES || !self.answer_handler() {
                    break;
                }
                waits += 1;
            }
            activity = Activity::Working;
        }
        activity.max(self.have_each(MmioDevice::step))
    }

    /// Has each device do `act`. A handler is expected if a driver is interrupted by it.
    fn have_each(&mut self, act: impl Fn(&mut MmioDevice) -> Activity) -> Activity {
        let interrupted = self.awaits_handler();
        let activity = devices(&mut self.slots).map(act).max();
        if !interrupted && self.awaits_handler() {
            self.handler.expect(Access::Status);
        }
        activity.unwrap_or(Activity::Idle)
    }

    /// Waits a moment for the next access of the handler of an interrupt, and answers it. True if it came.
    fn answer_handler(&mut self) -> bool {
        let Some(access) = self.handler.next().filter(|_| self.awaits_handler()) else {
            return false;
        };
        let began = Instant::now();
        let came = loop {
            if self.watch(HANDLER_LOOKS) {
                break true;
            }
            if began.elapsed() >= HANDLER_LIMIT {
                break false;
            }
        };
        self.handler.waited(access, came, began.elapsed());
        came
    }

    /// Requests that the devices have carried out, those that failed among them.
    pub fn requests(&self) -> u64 {
        let devices = self.slots.iter().filter_map(|(_, owner)| owner.device());
        devices.map(MmioDevice::requests).sum()
    }

    /// The time spent waiting for interrupt handlers.
    pub fn waited(&self) -> Duration {
        self.handler.total()
    }

    /// Looks for a trap as often as `times`, and answers the first. True if there was one.
    ///
    /// Xen looks whether a trap is answered before it takes the vCPU from its processor: an answer within
    /// a microsecond or two spares the guest being scheduled twice.
    pub fn watch(&mut self, times: u32) -> bool {
        (0..times).any(|_| {
            std::hint::spin_loop();
            self.answer_trap()
        })
    }

    /// Whether a driver has been interrupted and has not acknowledged it.
    fn awaits_handler(&self) -> bool {
        self.slots
            .iter()
            .filter_map(|(_, owner)| owner.device())
            .any(MmioDevice::awaits_handler)
    }

    /// Prepares for nobody calling [`GuestDevices::step`] until the hypervisor's or a device's events are there.
    /// [`Activity::Working`] if something is to be done after all.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn prepare_sleep(&mut self) -> io::Result<Activity> {
        // From here on a trap is an event again; one that came before is found by the step.
        self.hypervisor.clear_events()?;
        let activity = self.step();
        if activity == Activity::Working {
            return Ok(activity);
        }
        Ok(activity.max(self.have_each(MmioDevice::prepare_sleep)))
    }

    /// When [`GuestDevices::step`] is to be called though no event tells of it: dom0 lacks what a device waits for.
    pub fn try_again_at(&self) -> Option<Instant> {
        let devices = self.slots.iter().filter_map(|(_, owner)| owner.device());
        devices.filter_map(MmioDevice::try_again_at).min()
    }

    fn answer_trap(&mut self) -> bool {
        let Some(trap) = self.hypervisor.next_trap() else {
            return false;
        };
        let slots = &mut self.slots;
        match trap.request() {
            TrapRequest::Read { address, width } => {
                let Some((owner, offset)) = find(slots, address) else {
                    trap.answer(0);
                    return true;
                };
                trap.answer(owner.read(offset, width));
                if is_at(Register::InterruptStatus, offset, width) {
                    self.handler.expect(Access::Acknowledgement);
                }
            }
            TrapRequest::Write {
                address,
                width,
                value,
            } => {
                if let Some((owner, offset)) = find(slots, address) {
                    owner.write(offset, width, value);
                }
                trap.done();
            }
            TrapRequest::Invalidate => {
                for device in devices(slots) {
                    device.invalidate();
                }
                trap.done();
            }
            TrapRequest::Unknown => trap.done(),
        }
        true
    }
}

fn devices(slots: &mut [(MmioRange, RangeOwner)]) -> impl Iterator<Item = &mut MmioDevice> {
    slots.iter_mut().filter_map(|(_, owner)| owner.device_mut())
}

/// What answers for `address`, and the offset in its page.
fn find(slots: &mut [(MmioRange, RangeOwner)], address: u64) -> Option<(&mut RangeOwner, u64)> {
    slots.iter_mut().find_map(|(range, owner)| {
        let offset = range.offset_of(address)?;
        Some((owner, offset))
    })
}
