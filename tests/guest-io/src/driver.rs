//! Registers by hand.

use crate::platform::Platform;
use crate::queue::{Buffer, RawQueue};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use xen_virtio_transport::{Register, Width};

/// How long a device may take for what it does at once.
const LIMIT: Duration = Duration::from_secs(10);

/// A driver of one device, whose memory is granted.
#[derive(Clone)]
pub struct Driver {
    platform: Arc<dyn Platform>,
}

/// What [`Driver::negotiate`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Negotiated {
    Accepted,
    Refused,
}

impl Driver {
    pub fn new(platform: impl Platform + 'static) -> Self {
        Self {
            platform: Arc::new(platform),
        }
    }

    pub fn read(&self, register: Register) -> u32 {
        let value = self.raw_read(register.offset(), Width::Four);
        u32::try_from(value).expect("a read of four bytes")
    }

    pub fn write(&self, register: Register, value: u32) {
        self.raw_write(register.offset(), Width::Four, value.into());
    }

    /// Any access, at any offset of the device's page.
    pub fn raw_read(&self, offset: u64, width: Width) -> u64 {
        self.platform.read(offset, width)
    }

    pub fn raw_write(&self, offset: u64, width: Width, value: u64) {
        self.platform.write(offset, width, value);
    }

    pub fn offered_features(&self) -> u64 {
        [1, 0].into_iter().fold(0, |features, sel| {
            self.write(Register::DeviceFeaturesSel, sel);
            features << 32 | u64::from(self.read(Register::DeviceFeatures))
        })
    }

    /// From reset to FEATURES_OK.
    pub fn negotiate(&self, features: u64) -> Negotiated {
        self.write(Register::Status, 0);
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        self.write(Register::Status, status);
        status |= VIRTIO_CONFIG_S_DRIVER;
        self.write(Register::Status, status);
        for (sel, half) in [(0, features), (1, features >> 32)] {
            self.write(Register::DriverFeaturesSel, sel);
            self.write(
                Register::DriverFeatures,
                u32::try_from(half & 0xffff_ffff).expect("32 bits"),
            );
        }
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.write(Register::Status, status);
        if self.read(Register::Status) == status {
            Negotiated::Accepted
        } else {
            Negotiated::Refused
        }
    }

    /// Writes a queue's registers and starts it.
    pub fn start_queue(&self, index: u32, size: u32, [descriptors, available, used]: [u64; 3]) {
        self.write(Register::QueueSel, index);
        self.write(Register::QueueSize, size);
        for (low, high, address) in [
            (Register::QueueDescLow, Register::QueueDescHigh, descriptors),
            (
                Register::QueueDriverLow,
                Register::QueueDriverHigh,
                available,
            ),
            (Register::QueueDeviceLow, Register::QueueDeviceHigh, used),
        ] {
            self.write(low, u32::try_from(address & 0xffff_ffff).expect("32 bits"));
            self.write(high, u32::try_from(address >> 32).expect("32 bits"));
        }
        self.write(Register::QueueReady, 1);
    }

    pub fn driver_ok(&self) {
        self.write(
            Register::Status,
            self.read(Register::Status) | VIRTIO_CONFIG_S_DRIVER_OK,
        );
    }

    /// A device with all its features and queue 0 of `size` entries, running.
    pub fn start(&self, size: u16) -> RawQueue {
        self.start_with(0, size)
    }

    /// As [`Driver::start`], with the queue of this number and no other.
    pub fn start_with(&self, index: u32, size: u16) -> RawQueue {
        assert_eq!(
            self.negotiate(self.offered_features()),
            Negotiated::Accepted
        );
        let queue = RawQueue::new(self, size);
        self.start_queue(index, size.into(), queue.addresses());
        self.driver_ok();
        queue
    }

    pub fn notify(&self, queue: u32) {
        self.write(Register::QueueNotify, queue);
    }

    /// Guest memory that the device may use.
    pub fn buffer(&self, len: usize, device_writes: bool) -> Buffer {
        Buffer::new(self.platform.allocate(len, device_writes), len)
    }

    /// Returns when the device has done what it was told before: it may answer a few register reads first.
    pub fn settle(&self) {
        for _ in 0..200 {
            self.read(Register::Status);
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.read(Register::Status) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Waits until `condition` holds; false if it does not come to that.
    pub fn wait(&self, condition: impl Fn() -> bool) -> bool {
        let end = Instant::now() + LIMIT;
        while !condition() {
            if Instant::now() > end {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}
