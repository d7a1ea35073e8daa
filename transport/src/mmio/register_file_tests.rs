//! The register file by table, and by any sequence of accesses.

use super::super::registers::REGISTERS;
use super::*;
use crate::virtio_state::{Misstep, RestoreError};
use proptest::prelude::*;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use vm_memory::GuestAddress;
use xen_virtio_backend::{DeviceType, Identity};

const ACK: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const REQUIRED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM;

/// A device as its driver sees it.
#[derive(Debug)]
struct Device {
    registers: RegisterFile,
    state: VirtioState,
}

impl Device {
    fn restore(
        identity: Identity,
        required: u64,
        saved: SavedRegisters,
    ) -> Result<Self, RestoreError> {
        let (registers, state) = RegisterFile::restore(saved);
        let state = VirtioState::restore(identity, required, state)?;
        Ok(Self { registers, state })
    }

    fn saved(&self) -> SavedRegisters {
        self.registers.saved(&self.state)
    }

    fn read(&mut self, register: Register) -> u32 {
        self.registers.read(&self.state, register)
    }

    fn write(&mut self, register: Register, value: u32) -> Effect {
        self.registers.write(&mut self.state, register, value)
    }

    fn interrupt_for_used_buffers(&mut self) {
        assert!(self.registers.set_interrupt(true, false));
    }

    fn interrupt_for_configuration(&mut self) {
        assert!(self.registers.set_interrupt(false, true));
    }
}

fn new_device() -> Device {
    let identity = Identity {
        device_type: DeviceType::BLOCK,
        features: 0b101,
        queue_sizes: vec![256, 64],
    };
    Device {
        registers: RegisterFile::default(),
        state: VirtioState::new(identity, REQUIRED),
    }
}

/// Registers that take the most room to write down.
pub(crate) fn widest_registers(queues: usize) -> SavedRegisters {
    let queue = QueueState {
        size: u32::MAX,
        ready: false,
        descriptors: u64::MAX,
        available: u64::MAX,
        used: u64::MAX,
    };
    SavedRegisters {
        selectors: Selectors {
            device_features_sel: u32::MAX,
            driver_features_sel: u32::MAX,
            queue_sel: u32::MAX,
        },
        state: SavedState {
            status: u32::MAX,
            driver_features: u64::MAX,
            driver_features_beyond: false,
            queues: vec![queue; queues],
            config_generation: u32::MAX,
        },
    }
}

fn accept(device: &mut Device, features: u64) {
    for (sel, half) in [(0, low(features)), (1, high(features))] {
        assert_eq!(
            device.write(Register::DriverFeaturesSel, sel),
            Effect::Nothing
        );
        assert_eq!(
            device.write(Register::DriverFeatures, half),
            Effect::Nothing
        );
    }
}

/// As far as FEATURES_OK.
fn negotiated() -> Device {
    let mut device = new_device();
    for status in [ACK, ACK | DRIVER] {
        assert_eq!(device.write(Register::Status, status), Effect::Nothing);
    }
    accept(&mut device, REQUIRED);
    assert_eq!(
        device.write(Register::Status, ACK | DRIVER | FEATURES_OK),
        Effect::Nothing
    );
    assert_eq!(device.state.status(), ACK | DRIVER | FEATURES_OK);
    device
}

fn set_up_queue(device: &mut Device, queue: u32, size: u32) -> Effect {
    for (register, value) in [
        (Register::QueueSel, queue),
        (Register::QueueSize, size),
        (Register::QueueDescLow, 0x1000),
        (Register::QueueDescHigh, 0x8000_0000),
        (Register::QueueDriverLow, 0x2000),
        (Register::QueueDriverHigh, 0x8000_0000),
        (Register::QueueDeviceLow, 0x3000),
        (Register::QueueDeviceHigh, 0x8000_0000),
    ] {
        assert_eq!(device.write(register, value), Effect::Nothing);
    }
    device.write(Register::QueueReady, 1)
}

#[test]
fn the_probe_of_linux_virtio_mmio_finds_and_starts_the_device() {
    let mut device = new_device();
    assert_eq!(device.read(Register::MagicValue), 0x7472_6976);
    assert_eq!(device.read(Register::Version), 2);
    assert_eq!(device.read(Register::DeviceId), 2);
    assert_ne!(device.read(Register::VendorId), 0);
    assert_eq!(device.write(Register::Status, 0), Effect::Reset);
    let mut features = 0;
    for sel in [1, 0] {
        assert_eq!(
            device.write(Register::DeviceFeaturesSel, sel),
            Effect::Nothing
        );
        features = features << 32 | u64::from(device.read(Register::DeviceFeatures));
    }
    assert_eq!(features, REQUIRED | 0b101);
    let mut device = negotiated();
    assert_eq!(device.state.negotiated_features(), REQUIRED);
    assert_eq!(device.write(Register::QueueSel, 0), Effect::Nothing);
    assert_eq!(device.read(Register::QueueReady), 0);
    assert_eq!(device.read(Register::QueueSizeMax), 256);
    let Effect::StartQueue(index, setup) = set_up_queue(&mut device, 0, 128) else {
        panic!("not started")
    };
    assert_eq!(
        (index.get(), setup.layout.size, setup.features),
        (0, 128, REQUIRED)
    );
    assert_eq!(
        setup.layout.descriptors,
        GuestAddress(0x8000_0000_0000_1000)
    );
    assert_eq!(setup.layout.available, GuestAddress(0x8000_0000_0000_2000));
    assert_eq!(setup.layout.used, GuestAddress(0x8000_0000_0000_3000));
    assert_eq!(device.read(Register::QueueReady), 1);
    assert!(!device.state.is_live());
    assert_eq!(device.write(Register::QueueNotify, 0), Effect::Refused);
    let all = ACK | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(device.write(Register::Status, all), Effect::DriverOk);
    assert_eq!(
        device.write(Register::QueueNotify, 0),
        Effect::Notify(index)
    );
    assert_eq!(device.write(Register::QueueNotify, 1), Effect::Refused);
}

#[test]
fn features_are_refused_by_leaving_features_ok_clear() {
    for (features, accepted) in [
        (REQUIRED, true),
        (REQUIRED | 0b101, true),
        (REQUIRED | 0b10, false),
        (1 << VIRTIO_F_VERSION_1, false),
        (1 << VIRTIO_F_ACCESS_PLATFORM, false),
        (0, false),
        (u64::MAX, false),
    ] {
        let mut device = new_device();
        accept(&mut device, features);
        let _ = device.write(Register::Status, ACK | DRIVER | FEATURES_OK);
        assert_eq!(
            device.state.status() & FEATURES_OK != 0,
            accepted,
            "{features:#x}"
        );
    }
    let mut device = new_device();
    accept(&mut device, REQUIRED);
    let _ = device.write(Register::DriverFeaturesSel, 2);
    let _ = device.write(Register::DriverFeatures, 1);
    let _ = device.write(Register::Status, ACK | DRIVER | FEATURES_OK);
    assert_eq!(device.state.status() & FEATURES_OK, 0);
}

#[test]
fn status_bits_come_in_order_and_never_go_one_by_one() {
    for (before, value, after) in [
        (0, ACK, ACK),
        (0, DRIVER, 0),
        (0, DRIVER_OK, 0),
        (ACK, ACK | DRIVER_OK, ACK),
        (ACK, DRIVER, ACK),
        (ACK | DRIVER, ACK, ACK | DRIVER),
        (
            ACK | DRIVER,
            ACK | DRIVER | VIRTIO_CONFIG_S_NEEDS_RESET,
            ACK | DRIVER,
        ),
        (
            ACK,
            ACK | VIRTIO_CONFIG_S_FAILED,
            ACK | VIRTIO_CONFIG_S_FAILED,
        ),
        (ACK, !FEATURES_OK, ACK | DRIVER | VIRTIO_CONFIG_S_FAILED),
    ] {
        let mut saved = new_device().saved();
        saved.state.status = before;
        let identity = new_device().state.identity().clone();
        let mut device = Device::restore(identity, REQUIRED, saved).unwrap();
        let _ = device.write(Register::Status, value);
        assert_eq!(device.state.status(), after, "{before:#x} <- {value:#x}");
    }
}

#[test]
fn a_queue_that_is_not_there_reads_as_absent_and_takes_no_writes() {
    let mut device = negotiated();
    for queue in [2, 0xffff, 0x1_0000, u32::MAX] {
        assert_eq!(device.write(Register::QueueSel, queue), Effect::Nothing);
        assert_eq!(device.read(Register::QueueSizeMax), 0);
        assert_eq!(device.read(Register::QueueReady), 0);
        assert_eq!(device.write(Register::QueueSize, 1), Effect::Refused);
        assert_eq!(device.write(Register::QueueReady, 1), Effect::Refused);
        assert_eq!(device.write(Register::QueueNotify, queue), Effect::Refused);
    }
}

#[test]
fn a_running_queue_keeps_its_registers_and_starts_once() {
    let mut device = negotiated();
    assert!(matches!(
        set_up_queue(&mut device, 0, 128),
        Effect::StartQueue(..)
    ));
    assert_eq!(device.write(Register::QueueReady, 1), Effect::Refused);
    assert_eq!(device.write(Register::QueueDescLow, 0), Effect::Refused);
    assert_eq!(device.write(Register::QueueSize, 1), Effect::Refused);
    assert!(matches!(
        device.write(Register::QueueReady, 0),
        Effect::StopQueue(_)
    ));
    assert_eq!(device.write(Register::QueueReady, 0), Effect::Nothing);
    assert_eq!(device.write(Register::QueueReady, 2), Effect::Refused);
}

#[test]
fn a_size_beyond_what_is_offered_is_never_a_queue_size() {
    for size in [0, 512, 0x1_0000, 0x1_0080, u32::MAX] {
        let mut device = negotiated();
        let Effect::StartQueue(_, setup) = set_up_queue(&mut device, 0, size) else {
            panic!("{size}")
        };
        assert_eq!(setup.layout.size, 0);
    }
}

#[test]
fn no_queue_starts_before_the_features_are_settled() {
    let mut device = new_device();
    assert_eq!(set_up_queue(&mut device, 0, 128), Effect::Refused);
    assert_eq!(device.read(Register::QueueReady), 0);
}

#[test]
fn status_zero_forgets_everything_but_the_generation() {
    let mut device = negotiated();
    assert!(matches!(
        set_up_queue(&mut device, 1, 64),
        Effect::StartQueue(..)
    ));
    device.interrupt_for_used_buffers();
    device.state.set_needs_reset();
    assert_eq!(device.write(Register::Status, 0), Effect::Reset);
    assert_eq!(format!("{device:?}"), format!("{:?}", new_device()));
}

#[test]
fn registers_of_another_device_are_not_gone_on_from() {
    let device = negotiated();
    let identity = device.state.identity().clone();
    let fewer = Identity {
        queue_sizes: vec![256],
        ..identity.clone()
    };
    let restored = Device::restore(fewer, REQUIRED, device.saved());
    assert!(matches!(
        restored,
        Err(RestoreError::Queues {
            known: 2,
            offered: 1
        })
    ));
    let poorer = Identity {
        features: 0,
        ..identity
    };
    let required = REQUIRED & !(1 << VIRTIO_F_ACCESS_PLATFORM);
    let restored = Device::restore(poorer, required, device.saved());
    assert!(matches!(restored, Err(RestoreError::Features(_))));
}

#[test]
fn interrupt_causes_are_separate_and_cleared_only_by_acknowledging() {
    let mut device = new_device();
    device.interrupt_for_used_buffers();
    device.interrupt_for_configuration();
    assert_eq!(device.read(Register::InterruptStatus), 3);
    assert_eq!(device.read(Register::InterruptStatus), 3);
    assert_eq!(device.write(Register::InterruptAck, 1), Effect::Nothing);
    assert_eq!(device.read(Register::InterruptStatus), 2);
    assert_eq!(
        device.write(Register::InterruptAck, u32::MAX),
        Effect::Nothing
    );
    assert_eq!(device.read(Register::InterruptStatus), 0);
}

/// virtio 1.3, 4.2.2: the driver acknowledges what InterruptStatus showed it.
#[test]
fn a_cause_that_was_not_shown_is_not_acknowledged() {
    let mut device = new_device();
    device.interrupt_for_configuration();
    assert_eq!(device.write(Register::InterruptAck, 3), Effect::Nothing);
    assert!(device.registers.interrupt_pending());
    assert_eq!(device.read(Register::InterruptStatus), 2);
    device.interrupt_for_used_buffers();
    assert_eq!(device.write(Register::InterruptAck, 3), Effect::Nothing);
    assert_eq!(device.read(Register::InterruptStatus), 1);
    // Once more, after it was shown.
    device.interrupt_for_used_buffers();
    assert_eq!(device.write(Register::InterruptAck, 1), Effect::Nothing);
    assert_eq!(device.read(Register::InterruptStatus), 1);
    assert_eq!(device.write(Register::InterruptAck, 1), Effect::Nothing);
    assert!(!device.registers.interrupt_pending());
}

/// virtio 1.3, 2.1.2: a failure is told with an interrupt, for which the driver is not ready before DRIVER_OK.
#[test]
fn a_failure_before_driver_ok_is_told_with_it() {
    let mut device = negotiated();
    device.state.set_needs_reset();
    assert_eq!(device.state.status(), ACK | DRIVER | FEATURES_OK);
    assert!(!device.state.must_tell_failure());
    let all = ACK | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(device.write(Register::Status, all), Effect::DriverOk);
    assert_eq!(device.state.status(), all | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert!(device.state.must_tell_failure());
}

#[test]
fn what_keeps_a_driver_from_getting_on_is_known() {
    for (status, first) in [(2, 2), (8, 8), (4, 4), (0xb, 0), (0xe, 2), (5, 4), (9, 8)] {
        let mut device = new_device();
        accept(&mut device, REQUIRED);
        let _ = device.write(Register::Status, status);
        let expected = (first != 0).then_some(Misstep::StatusOrder {
            written: status,
            first,
        });
        assert_eq!(device.state.misstep(), expected, "{status:#x}");
    }
    for (features, expected) in [
        (REQUIRED & !(1 << VIRTIO_F_VERSION_1), Misstep::Legacy),
        (
            REQUIRED & !(1 << VIRTIO_F_ACCESS_PLATFORM),
            Misstep::NoAccessPlatform,
        ),
        (REQUIRED | 2, Misstep::UnknownFeatures(2)),
    ] {
        let mut device = new_device();
        accept(&mut device, features);
        let _ = device.write(Register::Status, ACK | DRIVER | FEATURES_OK);
        assert_eq!(device.state.misstep(), Some(expected));
    }
    let mut device = new_device();
    let _ = set_up_queue(&mut device, 1, 64);
    assert_eq!(device.state.misstep(), Some(Misstep::EarlyQueue(1)));
    let mut device = negotiated();
    let all = ACK | DRIVER | FEATURES_OK | DRIVER_OK;
    let _ = device.write(Register::Status, all);
    assert_eq!(device.state.misstep(), Some(Misstep::NoQueue));
    // It stays until a driver gets on.
    let _ = device.write(Register::Status, 0);
    assert_eq!(device.state.misstep(), Some(Misstep::NoQueue));
    let mut device = negotiated();
    device.state.misstep = Some(Misstep::Legacy);
    let _ = set_up_queue(&mut device, 0, 64);
    let _ = device.write(Register::Status, all);
    assert_eq!(device.state.misstep(), None);
}

#[test]
fn there_is_no_shared_memory_region_and_no_queue_in_reset() {
    let mut device = new_device();
    assert_eq!(device.write(Register::ShmSel, 0), Effect::Nothing);
    for register in [
        Register::ShmLenLow,
        Register::ShmLenHigh,
        Register::ShmBaseLow,
        Register::ShmBaseHigh,
    ] {
        assert_eq!(device.read(register), u32::MAX);
    }
    assert_eq!(device.write(Register::QueueReset, 1), Effect::Refused);
    assert_eq!(device.read(Register::QueueReset), 0);
}

proptest! {
    /// Whatever a driver writes, wherever: no panic, and what the specification promises holds.
    #[test]
    fn any_sequence_of_writes_keeps_the_invariants(
        writes in prop::collection::vec((0..REGISTERS.len(), prop_oneof![0u32..16, any::<u32>()]), 1..200)
    ) {
        let mut device = new_device();
        for (register, value) in writes {
            let effect = device.write(REGISTERS[register].1, value);
            for (_, register) in REGISTERS {
                let _ = device.read(register);
            }
            let status = device.state.status();
            if status & DRIVER_OK != 0 {
                prop_assert!(status & FEATURES_OK != 0);
            }
            if status & FEATURES_OK != 0 {
                prop_assert_eq!(device.state.negotiated_features() & REQUIRED, REQUIRED);
            }
            if let Effect::StartQueue(index, setup) = effect {
                prop_assert!(index.get() < 2);
                prop_assert!(setup.layout.size <= [256, 64][index.get()]);
                prop_assert_eq!(setup.features & !device.state.identity().features, 0);
            }
            device.state.misstep = None;
            device.registers.interrupt_unread = 0;
            let saved = serde_json::to_string(&device.saved()).unwrap();
            let restored = Device::restore(
                device.state.identity().clone(),
                REQUIRED,
                serde_json::from_str(&saved).unwrap(),
            );
            prop_assert_eq!(format!("{:?}", restored.unwrap()), format!("{device:?}"));
        }
    }
}
