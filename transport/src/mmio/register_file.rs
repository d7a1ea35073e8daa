//! The registers of virtio-mmio over a device's [`VirtioState`]: selectors, halves of addresses, the interrupt status.

use super::registers::Register;
use crate::virtio_state::{
    Effect, QueueState, SavedState, VirtioState, high, low, set_high, set_low,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use xen_virtio_backend::QueueIndex;

pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
pub(super) const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"XEN\0");

/// What the driver has selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selectors {
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

/// What the driver has set, and must find again whichever process serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRegisters {
    #[serde(flatten)]
    selectors: Selectors,
    #[serde(flatten)]
    state: SavedState,
}

/// The registers of one virtio-mmio device, but for those that are its [`VirtioState`].
#[derive(Clone, Debug, Default)]
pub struct RegisterFile {
    selectors: Selectors,
    /// Why the driver is interrupted (virtio 1.3, 4.2.2).
    interrupt_status: u32,
    /// The causes among them that the driver has not read since they came up.
    interrupt_unread: u32,
}

impl RegisterFile {
    /// The registers as an earlier process left them, and the state behind them. What interrupted the driver last is not
    /// among them: it is to be interrupted again.
    pub(crate) fn restore(saved: SavedRegisters) -> (Self, SavedState) {
        let SavedRegisters { selectors, state } = saved;
        let registers = Self {
            selectors,
            ..Self::default()
        };
        (registers, state)
    }

    /// What [`RegisterFile::restore`] goes on from.
    pub(crate) fn saved(&self, state: &VirtioState) -> SavedRegisters {
        SavedRegisters {
            selectors: self.selectors,
            state: state.saved().clone(),
        }
    }

    /// What the driver reads from `register`; zero from a write-only one.
    #[inline]
    pub fn read(&mut self, state: &VirtioState, register: Register) -> u32 {
        match register {
            Register::MagicValue => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => state.identity().device_type.0,
            Register::VendorId => VENDOR,
            Register::DeviceFeatures => match self.selectors.device_features_sel {
                0 => low(state.identity().features),
                1 => high(state.identity().features),
                _ => 0,
            },
            // Zero: not available (virtio 1.3, 4.2.2.2).
            Register::QueueSizeMax => self
                .selected(state)
                .map_or(0, |index| state.identity().queue_sizes[index.get()].into()),
            Register::QueueReady => self
                .selected(state)
                .map_or(0, |index| state.queue(index).ready.into()),
            Register::InterruptStatus => {
                self.interrupt_unread = 0;
                self.interrupt_status
            }
            Register::Status => state.status(),
            Register::ConfigGeneration => state.config_generation(),
            // A region that does not exist has length and base -1 (virtio 1.3, 4.2.2).
            Register::ShmLenLow
            | Register::ShmLenHigh
            | Register::ShmBaseLow
            | Register::ShmBaseHigh => u32::MAX,
            // RING_RESET is not offered: no queue is ever in reset.
            Register::QueueReset
            | Register::DeviceFeaturesSel
            | Register::DriverFeatures
            | Register::DriverFeaturesSel
            | Register::QueueSel
            | Register::QueueSize
            | Register::QueueNotify
            | Register::InterruptAck
            | Register::QueueDescLow
            | Register::QueueDescHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh
            | Register::ShmSel => 0,
        }
    }

    /// Carries out the driver's write of `value` to `register`.
    #[inline]
    pub fn write(&mut self, state: &mut VirtioState, register: Register, value: u32) -> Effect {
        match register {
            Register::DeviceFeaturesSel => self.selectors.device_features_sel = value,
            Register::DriverFeaturesSel => self.selectors.driver_features_sel = value,
            Register::DriverFeatures => {
                let word = self.selectors.driver_features_sel;
                return state.accept_features(word, value);
            }
            Register::QueueSel => self.selectors.queue_sel = value,
            Register::QueueSize => return self.set_queue(state, |queue| queue.size = value),
            Register::QueueDescLow => {
                return self.set_queue(state, |queue| set_low(&mut queue.descriptors, value));
            }
            Register::QueueDescHigh => {
                return self.set_queue(state, |queue| set_high(&mut queue.descriptors, value));
            }
            Register::QueueDriverLow => {
                return self.set_queue(state, |queue| set_low(&mut queue.available, value));
            }
            Register::QueueDriverHigh => {
                return self.set_queue(state, |queue| set_high(&mut queue.available, value));
            }
            Register::QueueDeviceLow => {
                return self.set_queue(state, |queue| set_low(&mut queue.used, value));
            }
            Register::QueueDeviceHigh => {
                return self.set_queue(state, |queue| set_high(&mut queue.used, value));
            }
            Register::QueueReady => {
                return match self.selected(state) {
                    Some(index) => state.set_queue_ready(index, value),
                    None => Effect::Refused,
                };
            }
            Register::QueueNotify => return state.notify(value),
            // What came up since the driver has looked is not what it acknowledges (virtio 1.3, 4.2.2).
            Register::InterruptAck => self.interrupt_status &= !value | self.interrupt_unread,
            Register::Status => return self.set_status(state, value),
            // There is no region to select.
            Register::ShmSel => {}
            Register::MagicValue
            | Register::Version
            | Register::DeviceId
            | Register::VendorId
            | Register::DeviceFeatures
            | Register::QueueSizeMax
            | Register::InterruptStatus
            | Register::ShmLenLow
            | Register::ShmLenHigh
            | Register::ShmBaseLow
            | Register::ShmBaseHigh
            | Register::QueueReset
            | Register::ConfigGeneration => return Effect::Refused,
        }
        Effect::Nothing
    }

    fn selected(&self, state: &VirtioState) -> Option<QueueIndex> {
        let count = state.identity().queue_sizes.len();
        QueueIndex::new(self.selectors.queue_sel, count)
    }

    /// Changes the selected queue, if there is one.
    // Rare: inlined, it made every access longer.
    #[inline(never)]
    fn set_queue(&self, state: &mut VirtioState, change: impl FnOnce(&mut QueueState)) -> Effect {
        match self.selected(state) {
            Some(index) => state.set_queue(index, change),
            None => Effect::Refused,
        }
    }

    // Rare: inlined, it made every access longer.
    #[inline(never)]
    fn set_status(&mut self, state: &mut VirtioState, value: u32) -> Effect {
        let effect = state.set_status(value);
        if effect == Effect::Reset {
            *self = Self::default();
        }
        effect
    }

    /// Whether the driver has been interrupted for a cause that it has not acknowledged.
    pub fn interrupt_pending(&self) -> bool {
        self.interrupt_status != 0
    }

    /// Shows the driver why it is interrupted. False if there is nothing to interrupt it for.
    pub(crate) fn set_interrupt(&mut self, used_buffers: bool, configuration: bool) -> bool {
        let used_buffers = u32::from(used_buffers) * VIRTIO_MMIO_INT_VRING;
        let causes = used_buffers | (u32::from(configuration) * VIRTIO_MMIO_INT_CONFIG);
        self.interrupt_status |= causes;
        self.interrupt_unread |= causes;
        causes != 0
    }
}

#[cfg(test)]
#[path = "register_file_tests.rs"]
pub(crate) mod tests;
