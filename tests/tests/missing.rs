//! A device that its guest knows, and that cannot be served for a while; and a place where none is.

use tempfile::NamedTempFile;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use xen_virtio_backend::DeviceType;
use xen_virtio_backend::blk::Disk;
use xen_virtio_sim::{FIRST_DEVICE, SimHypervisor, simulate};
use xen_virtio_tests::{Driver, Negotiated, disk_device, drive};
use xen_virtio_transport::{DeviceState, GuestDevices, MmioDevice, MmioRange, Register};

const RUNNING: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

fn disk(machine: &mut GuestDevices<SimHypervisor>, state: DeviceState) -> MmioDevice {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let disk = Disk::open(file.path(), false).unwrap();
    disk_device(machine.hypervisor(), disk, state)
}

/// The status of a running device that was missing for a while, in which its driver did `meanwhile`.
fn status_after(meanwhile: impl FnOnce(&Driver) + Send + 'static) -> u32 {
    let (hypervisor, guest) = simulate(64).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let state = DeviceState::private().unwrap();
    let device = disk(&mut machine, state.clone());
    let slot = machine.add(FIRST_DEVICE, device).unwrap();
    drive(&mut machine, &guest, |driver| {
        let features = driver.offered_features();
        assert_eq!(driver.negotiate(features), Negotiated::Accepted);
        driver.driver_ok();
        assert_eq!(driver.read(Register::Status), RUNNING);
    });
    machine.remove(slot);
    machine.add_missing(FIRST_DEVICE, state.clone()).unwrap();
    drive(&mut machine, &guest, |driver| {
        assert_eq!(driver.read(Register::DeviceId), 0, "it is not there");
        meanwhile(driver);
    });
    let device = disk(&mut machine, state.clone());
    machine.add(FIRST_DEVICE, device).unwrap();
    drive(&mut machine, &guest, |driver| driver.read(Register::Status))
}

#[test]
fn a_missing_device_comes_back_as_it_was() {
    let writes = |driver: &Driver| {
        driver.write(Register::Status, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        driver.write(Register::QueueSel, 0);
        driver.notify(0);
    };
    assert_eq!(status_after(writes), RUNNING);
}

/// A driver that has its memory for itself again, as it was told or as it is new, must not have it written.
#[test]
fn a_driver_that_parts_from_a_missing_device_finds_it_reset() {
    for parts in [
        |driver: &Driver| driver.write(Register::Status, 0),
        |driver: &Driver| driver.write(Register::QueueReady, 0),
        |driver: &Driver| assert_eq!(driver.read(Register::MagicValue), 0),
    ] {
        assert_eq!(status_after(parts), 0);
    }
}

/// A driver passes such a place by without a word (virtio 1.3, 4.2.2.2), whatever it does there, and finds what comes later.
#[test]
fn a_place_without_a_device_is_a_placeholder() {
    let (hypervisor, guest) = simulate(64).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let placeholder = |driver: &Driver| {
        driver.write(Register::Status, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        driver.notify(0);
        let registers = [
            Register::MagicValue,
            Register::Version,
            Register::DeviceId,
            Register::Status,
            Register::InterruptStatus,
        ];
        let magic = u32::from_le_bytes(*b"virt");
        let found = registers.map(|register| driver.read(register));
        assert_eq!(found, [magic, 2, 0, 0, 0]);
    };
    machine.claim(FIRST_DEVICE).unwrap();
    drive(&mut machine, &guest, placeholder);
    let device = disk(&mut machine, DeviceState::private().unwrap());
    let slot = machine.add(FIRST_DEVICE, device).unwrap();
    // As the next worker is told, which has the device already.
    machine.claim(FIRST_DEVICE).unwrap();
    drive(&mut machine, &guest, |driver| {
        assert_eq!(driver.read(Register::DeviceId), DeviceType::BLOCK.0);
    });
    machine.remove(slot);
    drive(&mut machine, &guest, placeholder);
    let next = MmioRange {
        base: FIRST_DEVICE.base + FIRST_DEVICE.len / 2,
        ..FIRST_DEVICE
    };
    machine.claim(next).unwrap_err();
}
