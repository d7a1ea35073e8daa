//! The `virtio-drivers` crate on a simulated guest: its registers trap to the hypervisor.

use crate::hypervisor::SimGuest;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr};
use xen_virtio_transport::{MmioRange, Register, Width};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `VIRTIO_F_ACCESS_PLATFORM`: the crate's drivers leave it to the platform that their memory goes
/// through, which is [`SimHal`](crate::SimHal) here.
const ACCESS_PLATFORM: u64 = 1 << 33;
const CONFIG_SPACE: u64 = 0x100;

/// A virtio-mmio device of a simulated guest.
pub struct SimTransport {
    guest: SimGuest,
    range: MmioRange,
}

impl SimTransport {
    pub fn new(guest: SimGuest, range: MmioRange) -> Self {
        Self { guest, range }
    }

    fn read(&self, register: Register) -> u32 {
        let value = self
            .guest
            .read(self.range.base + register.offset(), Width::Four);
        u32::try_from(value).expect("a read of four bytes")
    }

    fn write(&self, register: Register, value: u32) {
        self.guest.write(
            self.range.base + register.offset(),
            Width::Four,
            value.into(),
        );
    }

    fn write_halves(&self, low: Register, high: Register, value: u64) {
        let [l0, l1, l2, l3, high_bytes @ ..] = value.to_le_bytes();
        self.write(low, u32::from_le_bytes([l0, l1, l2, l3]));
        self.write(high, u32::from_le_bytes(high_bytes));
    }
}

impl Transport for SimTransport {
    fn device_type(&self) -> DeviceType {
        DeviceType::try_from(self.read(Register::DeviceId)).expect("a type that the crate knows")
    }

    fn read_device_features(&mut self) -> u64 {
        let mut features = 0;
        for sel in [1, 0] {
            self.write(Register::DeviceFeaturesSel, sel);
            features = features << 32 | u64::from(self.read(Register::DeviceFeatures));
        }
        features
    }

    fn write_driver_features(&mut self, features: u64) {
        let features = features | self.read_device_features() & ACCESS_PLATFORM;
        for (sel, half) in [(0, features), (1, features >> 32)] {
            self.write(Register::DriverFeaturesSel, sel);
            self.write(
                Register::DriverFeatures,
                u32::try_from(half & 0xffff_ffff).expect("32 bits"),
            );
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(Register::QueueSel, queue.into());
        self.read(Register::QueueSizeMax)
    }

    fn notify(&mut self, queue: u16) {
        self.write(Register::QueueNotify, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(Register::Status))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(Register::Status, status.bits());
    }

    /// A register of the legacy interface, which there is not.
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(Register::QueueSel, queue.into());
        self.write(Register::QueueSize, size);
        self.write_halves(Register::QueueDescLow, Register::QueueDescHigh, descriptors);
        self.write_halves(
            Register::QueueDriverLow,
            Register::QueueDriverHigh,
            driver_area,
        );
        self.write_halves(
            Register::QueueDeviceLow,
            Register::QueueDeviceHigh,
            device_area,
        );
        self.write(Register::QueueReady, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(Register::QueueSel, queue.into());
        self.write(Register::QueueReady, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(Register::QueueSel, queue.into());
        self.read(Register::QueueReady) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(Register::InterruptStatus);
        if status != 0 {
            self.write(Register::InterruptAck, status);
        }
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(Register::ConfigGeneration)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        for (byte, address) in value
            .as_mut_bytes()
            .iter_mut()
            .zip(self.range.base + CONFIG_SPACE + offset as u64..)
        {
            *byte = self.guest.read(address, Width::One).to_le_bytes()[0];
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        for (byte, address) in value
            .as_bytes()
            .iter()
            .zip(self.range.base + CONFIG_SPACE + offset as u64..)
        {
            self.guest.write(address, Width::One, (*byte).into());
        }
        Ok(())
    }
}

impl Drop for SimTransport {
    fn drop(&mut self) {
        // The queues' memory is freed with the driver; the device must let go of it first.
        self.set_status(DeviceStatus::empty());
    }
}
