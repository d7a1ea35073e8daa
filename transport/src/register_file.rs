//! The state behind a device's registers: pure, so that every access can be tried.
//!
//! A write returns the [`Effect`] that it has beyond the registers; whoever owns the device performs it.

use crate::interrupt::Cause;
use crate::registers::Register;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use vm_memory::GuestAddress;
use xen_virtio_backend::{Identity, QueueIndex, QueueLayout};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"XEN\0");

/// The status bits that a driver may set (virtio 1.3, 2.1), in the order in which it may.
const DRIVER_STATUS: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// What a queue is set up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    pub layout: QueueLayout,
    /// The features that the driver accepted.
    pub features: u64,
}

/// What a register write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    Nothing,
    /// The driver did what the specification forbids; the write changed nothing.
    Refused,
    StartQueue(QueueIndex, QueueSetup),
    StopQueue(QueueIndex),
    /// The driver made requests available on a running queue.
    Notify(QueueIndex),
    /// The driver is ready: it may have made requests available before it said so.
    DriverOk,
    /// Back to how the device began.
    Reset,
}

/// The registers of one virtio-mmio device.
#[derive(Clone, Debug)]
pub struct RegisterFile {
    identity: Identity,
    /// Of the offered features, those that the driver must accept.
    required_features: u64,
    set: SavedRegisters,
    interrupt_status: u32,
    /// The causes among them that the driver has not read since they came up.
    interrupt_unread: u32,
    misstep: Option<Misstep>,
}

/// What keeps a driver from getting on, by its own doing: the last such thing, until the device is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misstep {
    #[error(
        "the driver wrote the status {written:#x}, and the bits of it from {first:#x} on were left clear: those before must be \
         set first (virtio 1.3, 3.1.1)"
    )]
    StatusOrder { written: u32, first: u32 },
    #[error(
        "the driver accepted no VIRTIO_F_VERSION_1: it is older than virtio 1.0, which this device begins with"
    )]
    Legacy,
    #[error(
        "the driver accepted no VIRTIO_F_ACCESS_PLATFORM, which a device with grant_usage=1 requires: is CONFIG_XEN_VIRTIO in \
         the guest's kernel? If it cannot be, set grant_usage=0"
    )]
    NoAccessPlatform,
    #[error("the driver accepted the features {0:#x}, which were not offered")]
    UnknownFeatures(u64),
    #[error(
        "the driver made queue {0} ready before FEATURES_OK, and it was not started (virtio 1.3, 3.1.1)"
    )]
    EarlyQueue(usize),
    #[error("the driver set DRIVER_OK with no queue ready (virtio 1.3, 3.1.1)")]
    NoQueue,
}

/// What the driver has set, and must find again whichever process serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRegisters {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// A feature beyond bit 63 was accepted, and none is offered.
    driver_features_beyond: bool,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    config_generation: u32,
}

/// Why what an earlier process knew of a device is not this device's.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the driver knows {known} queues, and this device has {offered}")]
    Queues { known: usize, offered: usize },
    #[error("the driver accepted the features {0:#x}, which this device does not offer")]
    Features(u64),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl RegisterFile {
    /// The registers of a device that offers its own features and the `required_features`, without which no driver gets on.
    pub fn new(identity: Identity, required_features: u64) -> Self {
        let set = SavedRegisters {
            queues: vec![QueueRegisters::default(); identity.queue_sizes.len()],
            ..SavedRegisters::default()
        };
        Self::with(identity, required_features, set)
    }

    fn with(mut identity: Identity, required_features: u64, set: SavedRegisters) -> Self {
        identity.features |= required_features;
        Self {
            identity,
            required_features,
            set,
            interrupt_status: 0,
            interrupt_unread: 0,
            misstep: None,
        }
    }

    /// The registers as an earlier process left them. What interrupted the driver last is not among them:
    /// it is to be interrupted again.
    ///
    /// # Errors
    ///
    /// [`RestoreError`] if the driver settled on something that this device does not have.
    pub fn restore(
        identity: Identity,
        required_features: u64,
        set: SavedRegisters,
    ) -> Result<Self, RestoreError> {
        let (known, offered) = (set.queues.len(), identity.queue_sizes.len());
        if known != offered {
            return Err(RestoreError::Queues { known, offered });
        }
        let restored = Self::with(identity, required_features, set);
        let beyond = restored.negotiated_features() & !restored.identity.features;
        if beyond != 0 {
            return Err(RestoreError::Features(beyond));
        }
        Ok(restored)
    }

    /// What [`RegisterFile::restore`] goes on from.
    pub fn set(&self) -> &SavedRegisters {
        &self.set
    }

    fn reset(&mut self) {
        let Self {
            identity: _,
            required_features: _,
            set,
            interrupt_status,
            interrupt_unread,
            // It is what a driver that starts anew is most likely to come to again.
            misstep: _,
        } = self;
        let SavedRegisters {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            driver_features_beyond,
            queue_sel,
            queues,
            // A driver that compares generations across a reset must see a change it missed.
            config_generation: _,
        } = set;
        *status = 0;
        *device_features_sel = 0;
        *driver_features_sel = 0;
        *driver_features = 0;
        *driver_features_beyond = false;
        *queue_sel = 0;
        queues.fill(QueueRegisters::default());
        *interrupt_status = 0;
        *interrupt_unread = 0;
    }

    /// What the driver reads from `register`; zero from a write-only one.
    pub fn read(&mut self, register: Register) -> u32 {
        match register {
            Register::MagicValue => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => self.identity.device_type.0,
            Register::VendorId => VENDOR,
            Register::DeviceFeatures => match self.set.device_features_sel {
                0 => low(self.identity.features),
                1 => high(self.identity.features),
                _ => 0,
            },
            // Zero: not available (virtio 1.3, 4.2.2.2).
            Register::QueueSizeMax => self
                .selected()
                .map_or(0, |index| self.identity.queue_sizes[index.get()].into()),
            Register::QueueReady => self
                .selected()
                .map_or(0, |index| self.set.queues[index.get()].ready.into()),
            Register::InterruptStatus => {
                self.interrupt_unread = 0;
                self.interrupt_status
            }
            Register::Status => self.status(),
            Register::ConfigGeneration => self.set.config_generation,
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
    pub fn write(&mut self, register: Register, value: u32) -> Effect {
        match register {
            Register::DeviceFeaturesSel => self.set.device_features_sel = value,
            Register::DriverFeaturesSel => self.set.driver_features_sel = value,
            Register::DriverFeatures => return self.accept_features(value),
            Register::QueueSel => self.set.queue_sel = value,
            Register::QueueSize => return self.set_queue(|queue| queue.size = value),
            Register::QueueDescLow => {
                return self.set_queue(|queue| set_low(&mut queue.descriptors, value));
            }
            Register::QueueDescHigh => {
                return self.set_queue(|queue| set_high(&mut queue.descriptors, value));
            }
            Register::QueueDriverLow => {
                return self.set_queue(|queue| set_low(&mut queue.available, value));
            }
            Register::QueueDriverHigh => {
                return self.set_queue(|queue| set_high(&mut queue.available, value));
            }
            Register::QueueDeviceLow => {
                return self.set_queue(|queue| set_low(&mut queue.used, value));
            }
            Register::QueueDeviceHigh => {
                return self.set_queue(|queue| set_high(&mut queue.used, value));
            }
            Register::QueueReady => return self.set_queue_ready(value),
            Register::QueueNotify => return self.notify(value),
            // What came up since the driver has looked is not what it acknowledges (virtio 1.3, 4.2.2).
            Register::InterruptAck => self.interrupt_status &= !value | self.interrupt_unread,
            Register::Status => return self.set_status(value),
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

    fn selected(&self) -> Option<QueueIndex> {
        QueueIndex::new(self.set.queue_sel, self.set.queues.len())
    }

    fn has_status(&self, bit: u32) -> bool {
        self.set.status & bit != 0
    }

    fn accept_features(&mut self, value: u32) -> Effect {
        // virtio 1.3, 2.2.1: the driver must not change its mind after FEATURES_OK.
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return Effect::Refused;
        }
        match self.set.driver_features_sel {
            0 => set_low(&mut self.set.driver_features, value),
            1 => set_high(&mut self.set.driver_features, value),
            _ => self.set.driver_features_beyond |= value != 0,
        }
        Effect::Nothing
    }

    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        // virtio 1.3, 2.1.1: the driver must not clear a bit. It cannot set one that is the device's.
        let settable = DRIVER_STATUS
            .iter()
            .fold(VIRTIO_CONFIG_S_FAILED, |all, bit| all | bit);
        if self.set.status & settable & !value != 0 {
            return Effect::Refused;
        }
        let before = self.set.status;
        self.set.status |= value & VIRTIO_CONFIG_S_FAILED;
        for bit in DRIVER_STATUS {
            // A bit without the one before it is the driver's mistake, and FEATURES_OK without acceptable
            // features is how the device says no (virtio 1.3, 2.2.2): both stay clear.
            if value & bit == 0 {
                break;
            }
            if bit == VIRTIO_CONFIG_S_FEATURES_OK
                && let Some(misstep) = self.unacceptable_features()
            {
                self.misstep = Some(misstep);
                return Effect::Nothing;
            }
            self.set.status |= bit;
        }
        let driver_bits = DRIVER_STATUS.iter().fold(0, |all, bit| all | bit);
        let left_clear = value & driver_bits & !self.set.status;
        if left_clear != 0 {
            self.misstep = Some(Misstep::StatusOrder {
                written: value,
                first: left_clear & left_clear.wrapping_neg(),
            });
        }
        let newly = self.set.status & !before;
        if newly & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return Effect::Nothing;
        }
        self.misstep = (self.ready_queues() == 0).then_some(Misstep::NoQueue);
        Effect::DriverOk
    }

    /// What is wrong with the features that the driver accepted, if it has not settled on them.
    fn unacceptable_features(&self) -> Option<Misstep> {
        let features = self.identity.features;
        let accepted = self.set.driver_features;
        let missing = self.required_features & !accepted;
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            None
        } else if self.set.driver_features_beyond || accepted & !features != 0 {
            Some(Misstep::UnknownFeatures(accepted & !features))
        } else if missing & 1 << VIRTIO_F_VERSION_1 != 0 {
            Some(Misstep::Legacy)
        } else {
            (missing != 0).then_some(Misstep::NoAccessPlatform)
        }
    }

    /// Changes the selected queue. A queue that runs keeps what it runs with.
    fn set_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) -> Effect {
        match self.selected() {
            Some(index) if !self.set.queues[index.get()].ready => {
                change(&mut self.set.queues[index.get()]);
                Effect::Nothing
            }
            _ => Effect::Refused,
        }
    }

    fn set_queue_ready(&mut self, value: u32) -> Effect {
        let Some(index) = self.selected() else {
            return Effect::Refused;
        };
        let negotiated = self.has_status(VIRTIO_CONFIG_S_FEATURES_OK);
        let usable = negotiated && !self.needs_reset();
        if value == 1 && !negotiated {
            self.misstep = Some(Misstep::EarlyQueue(index.get()));
        }
        let queue = &mut self.set.queues[index.get()];
        match (value, queue.ready) {
            (1, false) if usable => {
                queue.ready = true;
                Effect::StartQueue(index, self.setup(index))
            }
            (0, true) => {
                queue.ready = false;
                Effect::StopQueue(index)
            }
            (0, false) => Effect::Nothing,
            _ => Effect::Refused,
        }
    }

    /// What a queue is to start with.
    fn setup(&self, index: QueueIndex) -> QueueSetup {
        let queue = self.set.queues[index.get()];
        let max = self.identity.queue_sizes[index.get()];
        let layout = QueueLayout {
            // A size that was never written, or is too large, is no queue's: let it be found invalid.
            size: u16::try_from(queue.size)
                .ok()
                .filter(|size| *size <= max)
                .unwrap_or(0),
            descriptors: GuestAddress(queue.descriptors),
            available: GuestAddress(queue.available),
            used: GuestAddress(queue.used),
        };
        QueueSetup {
            layout,
            features: self.set.driver_features,
        }
    }

    fn notify(&self, value: u32) -> Effect {
        match QueueIndex::new(value, self.set.queues.len()) {
            Some(index) if self.is_live() && self.set.queues[index.get()].ready => {
                Effect::Notify(index)
            }
            _ => Effect::Refused,
        }
    }

    /// Whether the device may work on its queues (virtio 1.3, 3.1.1).
    pub fn is_live(&self) -> bool {
        self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) && !self.needs_reset()
    }

    /// All queues, whatever their state.
    pub fn queues(&self) -> impl Iterator<Item = QueueIndex> + use<> {
        let count = self.set.queues.len();
        (0u32..).map_while(move |number| QueueIndex::new(number, count))
    }

    /// The queues that run, and what they were started with: none of a device that has failed.
    pub fn running_queues(&self) -> Vec<(QueueIndex, QueueSetup)> {
        self.queues()
            .filter(|index| self.set.queues[index.get()].ready && !self.needs_reset())
            .map(|index| (index, self.setup(index)))
            .collect()
    }

    /// How many queues the driver has set up.
    pub fn ready_queues(&self) -> usize {
        self.set.queues.iter().filter(|queue| queue.ready).count()
    }

    /// The status register. That the device has failed it does not say to a driver that is not ready to be
    /// told: with DRIVER_OK comes the interrupt for it too (virtio 1.3, 2.1.2).
    pub fn status(&self) -> u32 {
        if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.set.status
        } else {
            self.set.status & !VIRTIO_CONFIG_S_NEEDS_RESET
        }
    }

    /// What kept the driver from getting on, since the device was live the last time.
    pub fn misstep(&self) -> Option<Misstep> {
        self.misstep
    }

    /// Whether the driver has been interrupted for a cause that it has not acknowledged.
    pub fn interrupt_pending(&self) -> bool {
        self.interrupt_status != 0
    }

    /// The features that the driver accepted, zero until it is done choosing.
    pub fn negotiated_features(&self) -> u64 {
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.set.driver_features
        } else {
            0
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    /// The device has failed (virtio 1.3, 2.1.2).
    pub fn set_needs_reset(&mut self) {
        self.set.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    /// Whether a device that has failed is to tell its driver: not before DRIVER_OK.
    pub fn must_tell_failure(&self) -> bool {
        self.needs_reset() && self.has_status(VIRTIO_CONFIG_S_DRIVER_OK)
    }

    /// The configuration space has changed (virtio 1.3, 2.5.1).
    pub fn change_configuration(&mut self) {
        self.set.config_generation = self.set.config_generation.wrapping_add(1);
    }

    pub(crate) fn set_interrupt(&mut self, cause: Cause) {
        self.interrupt_status |= cause.bit();
        self.interrupt_unread |= cause.bit();
    }
}

fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)).try_into().expect("32 bits")
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(target: &mut u64, value: u32) {
    *target = (*target & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = u64::from(low(*target)) | (u64::from(value) << 32);
}

#[cfg(test)]
#[path = "register_file_tests.rs"]
pub(crate) mod tests;
