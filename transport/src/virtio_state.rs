//! The state of a virtio device, apart from how a driver reaches it: pure, so that every step can be tried.
//!
//! What a driver does returns the [`Effect`] that it has beyond this state; whoever owns the device performs it.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use vm_memory::GuestAddress;
use xen_virtio_backend::{Identity, QueueIndex, QueueLayout};

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

/// What a driver's access asks of the device.
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

/// Why what an earlier process knew of a device is not this device's.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the driver knows {known} queues, and this device has {offered}")]
    Queues { known: usize, offered: usize },
    #[error("the driver accepted the features {0:#x}, which this device does not offer")]
    Features(u64),
}

/// What a driver has set of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueState {
    pub(crate) size: u32,
    pub(crate) ready: bool,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// What a driver has set, and must find again whichever process serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedState {
    pub(crate) status: u32,
    pub(crate) driver_features: u64,
    /// A feature beyond bit 63 was accepted, and none is offered.
    pub(crate) driver_features_beyond: bool,
    pub(crate) queues: Vec<QueueState>,
    pub(crate) config_generation: u32,
}

/// The state of one device.
#[derive(Clone, Debug)]
pub struct VirtioState {
    identity: Identity,
    /// Of the offered features, those that the driver must accept.
    required_features: u64,
    saved: SavedState,
    pub(crate) misstep: Option<Misstep>,
}

impl VirtioState {
    /// A device that offers its own features and the `required_features`, without which no driver gets on.
    pub fn new(identity: Identity, required_features: u64) -> Self {
        let saved = SavedState {
            queues: vec![QueueState::default(); identity.queue_sizes.len()],
            ..SavedState::default()
        };
        Self::with(identity, required_features, saved)
    }

    fn with(mut identity: Identity, required_features: u64, saved: SavedState) -> Self {
        identity.features |= required_features;
        Self {
            identity,
            required_features,
            saved,
            misstep: None,
        }
    }

    /// The device as an earlier process left it.
    ///
    /// # Errors
    ///
    /// [`RestoreError`] if the driver settled on something that this device does not have.
    pub(crate) fn restore(
        identity: Identity,
        required_features: u64,
        saved: SavedState,
    ) -> Result<Self, RestoreError> {
        let (known, offered) = (saved.queues.len(), identity.queue_sizes.len());
        if known != offered {
            return Err(RestoreError::Queues { known, offered });
        }
        let restored = Self::with(identity, required_features, saved);
        let beyond = restored.negotiated_features() & !restored.identity.features;
        if beyond != 0 {
            return Err(RestoreError::Features(beyond));
        }
        Ok(restored)
    }

    /// What [`VirtioState::restore`] goes on from.
    pub(crate) fn saved(&self) -> &SavedState {
        &self.saved
    }

    /// What the device shows its driver, with all features that it offers.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn config_generation(&self) -> u32 {
        self.saved.config_generation
    }

    fn reset(&mut self) {
        let Self {
            identity: _,
            required_features: _,
            saved,
            // It is what a driver that starts anew is most likely to come to again.
            misstep: _,
        } = self;
        let SavedState {
            status,
            driver_features,
            driver_features_beyond,
            queues,
            // A driver that compares generations across a reset must see a change it missed.
            config_generation: _,
        } = saved;
        *status = 0;
        *driver_features = 0;
        *driver_features_beyond = false;
        queues.fill(QueueState::default());
    }

    fn has_status(&self, bit: u32) -> bool {
        self.saved.status & bit != 0
    }

    /// The driver accepts `value` of the features whose bits begin at 32 times `word`.
    pub fn accept_features(&mut self, word: u32, value: u32) -> Effect {
        // virtio 1.3, 2.2.1: the driver must not change its mind after FEATURES_OK.
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return Effect::Refused;
        }
        match word {
            0 => set_low(&mut self.saved.driver_features, value),
            1 => set_high(&mut self.saved.driver_features, value),
            _ => self.saved.driver_features_beyond |= value != 0,
        }
        Effect::Nothing
    }

    /// The driver writes `value` to the status (virtio 1.3, 2.1).
    pub fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        // virtio 1.3, 2.1.1: the driver must not clear a bit. It cannot set one that is the device's.
        let settable = DRIVER_STATUS
            .iter()
            .fold(VIRTIO_CONFIG_S_FAILED, |all, bit| all | bit);
        if self.saved.status & settable & !value != 0 {
            return Effect::Refused;
        }
        let before = self.saved.status;
        self.saved.status |= value & VIRTIO_CONFIG_S_FAILED;
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
            self.saved.status |= bit;
        }
        let driver_bits = DRIVER_STATUS.iter().fold(0, |all, bit| all | bit);
        let left_clear = value & driver_bits & !self.saved.status;
        if left_clear != 0 {
            self.misstep = Some(Misstep::StatusOrder {
                written: value,
                first: left_clear & left_clear.wrapping_neg(),
            });
        }
        let newly = self.saved.status & !before;
        if newly & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return Effect::Nothing;
        }
        self.misstep = (self.ready_queues() == 0).then_some(Misstep::NoQueue);
        Effect::DriverOk
    }

    /// What is wrong with the features that the driver accepted, if it has not settled on them.
    fn unacceptable_features(&self) -> Option<Misstep> {
        let features = self.identity.features;
        let accepted = self.saved.driver_features;
        let missing = self.required_features & !accepted;
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            None
        } else if self.saved.driver_features_beyond || accepted & !features != 0 {
            Some(Misstep::UnknownFeatures(accepted & !features))
        } else if missing & 1 << VIRTIO_F_VERSION_1 != 0 {
            Some(Misstep::Legacy)
        } else {
            (missing != 0).then_some(Misstep::NoAccessPlatform)
        }
    }

    /// What the driver has set of a queue.
    pub(crate) fn queue(&self, index: QueueIndex) -> &QueueState {
        &self.saved.queues[index.get()]
    }

    /// Changes a queue. One that runs keeps what it runs with.
    pub(crate) fn set_queue(
        &mut self,
        index: QueueIndex,
        change: impl FnOnce(&mut QueueState),
    ) -> Effect {
        let queue = &mut self.saved.queues[index.get()];
        if queue.ready {
            return Effect::Refused;
        }
        change(queue);
        Effect::Nothing
    }

    /// The driver starts a queue with 1, and stops it with 0.
    pub fn set_queue_ready(&mut self, index: QueueIndex, value: u32) -> Effect {
        let negotiated = self.has_status(VIRTIO_CONFIG_S_FEATURES_OK);
        let usable = negotiated && !self.needs_reset();
        if value == 1 && !negotiated {
            self.misstep = Some(Misstep::EarlyQueue(index.get()));
        }
        let queue = &mut self.saved.queues[index.get()];
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
        let queue = self.saved.queues[index.get()];
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
            features: self.saved.driver_features,
        }
    }

    /// The driver kicks the queue of this number.
    #[inline]
    pub fn notify(&self, number: u32) -> Effect {
        match QueueIndex::new(number, self.saved.queues.len()) {
            Some(index) if self.is_live() && self.saved.queues[index.get()].ready => {
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
        let count = self.saved.queues.len();
        (0u32..).map_while(move |number| QueueIndex::new(number, count))
    }

    /// The queues that run, and what they were started with: none of a device that has failed.
    pub fn running_queues(&self) -> Vec<(QueueIndex, QueueSetup)> {
        self.queues()
            .filter(|index| self.saved.queues[index.get()].ready && !self.needs_reset())
            .map(|index| (index, self.setup(index)))
            .collect()
    }

    /// How many queues the driver has set up.
    pub fn ready_queues(&self) -> usize {
        self.saved.queues.iter().filter(|queue| queue.ready).count()
    }

    /// The status register. That the device has failed it does not say to a driver that is not ready to be
    /// told: with DRIVER_OK comes the interrupt for it too (virtio 1.3, 2.1.2).
    pub fn status(&self) -> u32 {
        if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.saved.status
        } else {
            self.saved.status & !VIRTIO_CONFIG_S_NEEDS_RESET
        }
    }

    /// What kept the driver from getting on, since the device was live the last time.
    pub fn misstep(&self) -> Option<Misstep> {
        self.misstep
    }

    /// The features that the driver accepted, zero until it is done choosing.
    pub fn negotiated_features(&self) -> u64 {
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.saved.driver_features
        } else {
            0
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    /// The device has failed (virtio 1.3, 2.1.2).
    pub fn set_needs_reset(&mut self) {
        self.saved.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    /// Whether a device that has failed is to tell its driver: not before DRIVER_OK.
    pub fn must_tell_failure(&self) -> bool {
        self.needs_reset() && self.has_status(VIRTIO_CONFIG_S_DRIVER_OK)
    }

    /// The configuration space has changed (virtio 1.3, 2.5.1).
    pub fn change_configuration(&mut self) {
        self.saved.config_generation = self.saved.config_generation.wrapping_add(1);
    }
}

pub(crate) fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)).try_into().expect("32 bits")
}

pub(crate) fn high(value: u64) -> u32 {
    low(value >> 32)
}

pub(crate) fn set_low(target: &mut u64, value: u32) {
    *target = (*target & !u64::from(u32::MAX)) | u64::from(value);
}

pub(crate) fn set_high(target: &mut u64, value: u32) {
    *target = u64::from(low(*target)) | (u64::from(value) << 32);
}
