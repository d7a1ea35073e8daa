//! The register layout of virtio-mmio version 2 (virtio 1.3, 4.2.2).

use crate::hypervisor::Width;
use std::collections::BTreeMap;
use virtio_bindings::virtio_mmio as mmio;

/// A 32-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    MagicValue,
    Version,
    DeviceId,
    VendorId,
    DeviceFeatures,
    DeviceFeaturesSel,
    DriverFeatures,
    DriverFeaturesSel,
    QueueSel,
    QueueSizeMax,
    QueueSize,
    QueueReady,
    QueueNotify,
    InterruptStatus,
    InterruptAck,
    Status,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
    ShmSel,
    ShmLenLow,
    ShmLenHigh,
    ShmBaseLow,
    ShmBaseHigh,
    QueueReset,
    ConfigGeneration,
}

impl Register {
    /// Whether what the driver writes there stays, and is not done with at once.
    pub(crate) fn keeps_writes(self) -> bool {
        !matches!(self, Self::QueueNotify | Self::InterruptAck | Self::ShmSel)
    }

    /// Where the register is in the device's page.
    pub fn offset(self) -> u64 {
        let place = REGISTERS.iter().find(|(_, register)| *register == self);
        u64::from(place.expect("every register is in the table").0)
    }
}

/// `QueueReset`, which the kernel's header does not have.
const QUEUE_RESET: u32 = 0x0c0;

/// Every register with its offset.
pub(crate) const REGISTERS: [(u32, Register); 29] = [
    (mmio::VIRTIO_MMIO_MAGIC_VALUE, Register::MagicValue),
    (mmio::VIRTIO_MMIO_VERSION, Register::Version),
    (mmio::VIRTIO_MMIO_DEVICE_ID, Register::DeviceId),
    (mmio::VIRTIO_MMIO_VENDOR_ID, Register::VendorId),
    (mmio::VIRTIO_MMIO_DEVICE_FEATURES, Register::DeviceFeatures),
    (
        mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        Register::DeviceFeaturesSel,
    ),
    (mmio::VIRTIO_MMIO_DRIVER_FEATURES, Register::DriverFeatures),
    (
        mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        Register::DriverFeaturesSel,
    ),
    (mmio::VIRTIO_MMIO_QUEUE_SEL, Register::QueueSel),
    (mmio::VIRTIO_MMIO_QUEUE_NUM_MAX, Register::QueueSizeMax),
    (mmio::VIRTIO_MMIO_QUEUE_NUM, Register::QueueSize),
    (mmio::VIRTIO_MMIO_QUEUE_READY, Register::QueueReady),
    (mmio::VIRTIO_MMIO_QUEUE_NOTIFY, Register::QueueNotify),
    (
        mmio::VIRTIO_MMIO_INTERRUPT_STATUS,
        Register::InterruptStatus,
    ),
    (mmio::VIRTIO_MMIO_INTERRUPT_ACK, Register::InterruptAck),
    (mmio::VIRTIO_MMIO_STATUS, Register::Status),
    (mmio::VIRTIO_MMIO_QUEUE_DESC_LOW, Register::QueueDescLow),
    (mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH, Register::QueueDescHigh),
    (mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW, Register::QueueDriverLow),
    (
        mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        Register::QueueDriverHigh,
    ),
    (mmio::VIRTIO_MMIO_QUEUE_USED_LOW, Register::QueueDeviceLow),
    (mmio::VIRTIO_MMIO_QUEUE_USED_HIGH, Register::QueueDeviceHigh),
    (mmio::VIRTIO_MMIO_SHM_SEL, Register::ShmSel),
    (mmio::VIRTIO_MMIO_SHM_LEN_LOW, Register::ShmLenLow),
    (mmio::VIRTIO_MMIO_SHM_LEN_HIGH, Register::ShmLenHigh),
    (mmio::VIRTIO_MMIO_SHM_BASE_LOW, Register::ShmBaseLow),
    (mmio::VIRTIO_MMIO_SHM_BASE_HIGH, Register::ShmBaseHigh),
    (QUEUE_RESET, Register::QueueReset),
    (
        mmio::VIRTIO_MMIO_CONFIG_GENERATION,
        Register::ConfigGeneration,
    ),
];

/// How often a driver has accessed each part of a device's page.
#[derive(Debug, Default)]
pub(crate) struct TrapCounters {
    registers: [u64; REGISTERS.len()],
    config: u64,
    nothing: u64,
}

impl TrapCounters {
    pub(crate) fn count(&mut self, location: Location) {
        let counter = match location {
            Location::Register(register) => &mut self.registers[register as usize],
            Location::Config(_) => &mut self.config,
            Location::Nothing => &mut self.nothing,
        };
        *counter += 1;
    }

    pub(crate) fn of(&self, register: Register) -> u64 {
        self.registers[register as usize]
    }

    pub(crate) fn total(&self) -> u64 {
        self.registers.iter().sum::<u64>() + self.config + self.nothing
    }

    /// Those that are not zero, by name.
    pub(crate) fn by_register(&self) -> BTreeMap<String, u64> {
        REGISTERS
            .iter()
            .map(|(_, register)| (format!("{register:?}"), self.of(*register)))
            .chain([
                ("Config".to_owned(), self.config),
                ("none".to_owned(), self.nothing),
            ])
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// What an access of a device's page touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    Register(Register),
    /// Byte `0` is the first of the device's configuration space.
    Config(usize),
    /// No register, or one that is accessed at a width or offset that the specification forbids: reads
    /// give zero and writes do nothing.
    Nothing,
}

impl Location {
    /// What lies at `offset` for an access of `width`. Registers take aligned 32-bit accesses only, the
    /// configuration space any (virtio 1.3, 4.2.2.2).
    pub fn decode(offset: u64, width: Width) -> Self {
        let Ok(offset) = u32::try_from(offset) else {
            return Self::Nothing;
        };
        if let Some(config) = offset.checked_sub(mmio::VIRTIO_MMIO_CONFIG) {
            return Self::Config(config as usize);
        }
        REGISTERS
            .iter()
            .find(|(at, _)| *at == offset && width == Width::Four)
            .map_or(Self::Nothing, |(_, register)| Self::Register(*register))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTHS: [Width; 4] = [Width::One, Width::Two, Width::Four, Width::Eight];

    #[test]
    fn every_offset_at_every_width_is_one_thing() {
        for offset in 0..0x100 {
            for width in WIDTHS {
                let known = REGISTERS.iter().find(|(at, _)| u64::from(*at) == offset);
                let expected = match (known, width) {
                    (Some((_, register)), Width::Four) => Location::Register(*register),
                    _ => Location::Nothing,
                };
                assert_eq!(
                    Location::decode(offset, width),
                    expected,
                    "{offset:#x} {width:?}"
                );
            }
        }
    }

    #[test]
    fn the_configuration_space_begins_at_0x100() {
        for width in WIDTHS {
            assert_eq!(Location::decode(0x100, width), Location::Config(0));
            assert_eq!(Location::decode(0x1ff, width), Location::Config(0xff));
        }
        assert_eq!(Location::decode(u64::MAX, Width::Four), Location::Nothing);
    }
}
