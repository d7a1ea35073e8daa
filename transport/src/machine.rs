//! One guest: its devices, and the loop body that serves them.

use crate::hypervisor::{Hypervisor, MmioRange, TrapRequest};
use crate::mmio_device::MmioDevice;
use std::io;
use xen_virtio_backend::Activity;

/// Traps answered before the devices have a turn: a guest that does nothing but trap must not starve its
/// own queues.
const TRAPS_PER_TURN: usize = 64;

/// Why a device cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
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

/// Names a device of a [`Machine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(usize);

/// A guest and its devices.
pub struct Machine<H> {
    hypervisor: H,
    slots: Vec<(MmioRange, Option<MmioDevice>)>,
}

impl<H: Hypervisor> Machine<H> {
    pub fn new(hypervisor: H) -> Self {
        Self {
            hypervisor,
            slots: Vec::new(),
        }
    }

    pub fn hypervisor(&mut self) -> &mut H {
        &mut self.hypervisor
    }

    /// Claims `range` for `device`. The claim outlives the device: an access that nobody answers would
    /// end in a data abort in the guest.
    ///
    /// # Errors
    ///
    /// [`MachineError`], with nothing changed.
    pub fn add(&mut self, range: MmioRange, device: MmioDevice) -> Result<Slot, MachineError> {
        let MmioRange { base, len } = range;
        let vacant = |(other, device): &(MmioRange, Option<_>)| *other == range && device.is_none();
        if let Some(slot) = self.slots.iter().position(vacant) {
            // Claimed for the device that was here before.
            self.slots[slot].1 = Some(device);
            return Ok(Slot(slot));
        }
        if self.slots.iter().any(|(other, _)| other.overlaps(&range)) {
            return Err(MachineError::Overlap { base, len });
        }
        self.hypervisor
            .claim(range)
            .map_err(|source| MachineError::Claim { base, len, source })?;
        self.slots.push((range, Some(device)));
        Ok(Slot(self.slots.len() - 1))
    }

    /// Takes a device away. What the driver still reads there is zero: no virtio device.
    pub fn remove(&mut self, Slot(slot): Slot) {
        self.slots[slot].1 = None;
    }

    /// A device, unless it was removed.
    pub fn device(&self, Slot(slot): Slot) -> Option<&MmioDevice> {
        self.slots[slot].1.as_ref()
    }

    /// Answers the traps that wait, then gives each device a turn.
    pub fn turn(&mut self) -> Activity {
        let mut activity = Activity::Idle;
        for _ in 0..TRAPS_PER_TURN {
            if !self.answer_trap() {
                break;
            }
            activity = Activity::Working;
        }
        for device in devices(&mut self.slots) {
            activity = activity.max(device.process());
        }
        activity
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

    /// Prepares for nobody calling [`Machine::turn`] until the hypervisor's or a device's events are there.
    /// [`Activity::Working`] if something is to be done after all.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn rest(&mut self) -> io::Result<Activity> {
        // From here on a trap is an event again; one that came before is found by the turn.
        self.hypervisor.clear_events()?;
        let mut activity = self.turn();
        if activity < Activity::Working {
            for device in devices(&mut self.slots) {
                activity = activity.max(device.rest());
            }
        }
        Ok(activity)
    }

    fn answer_trap(&mut self) -> bool {
        let Some(trap) = self.hypervisor.next_trap() else {
            return false;
        };
        let slots = &mut self.slots;
        match trap.request() {
            TrapRequest::Read { address, width } => {
                let value =
                    find(slots, address).map_or(0, |(device, offset)| device.read(offset, width));
                trap.answer(value);
            }
            TrapRequest::Write {
                address,
                width,
                value,
            } => {
                if let Some((device, offset)) = find(slots, address) {
                    device.write(offset, width, value);
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

fn devices(slots: &mut [(MmioRange, Option<MmioDevice>)]) -> impl Iterator<Item = &mut MmioDevice> {
    slots.iter_mut().filter_map(|(_, device)| device.as_mut())
}

/// The device that answers for `address`, and the offset in its page.
fn find(
    slots: &mut [(MmioRange, Option<MmioDevice>)],
    address: u64,
) -> Option<(&mut MmioDevice, u64)> {
    slots.iter_mut().find_map(|(range, device)| {
        let offset = range.offset_of(address)?;
        device.as_mut().map(|device| (device, offset))
    })
}
