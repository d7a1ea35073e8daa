//! Interrupt handlers are waited for: a moment, and no longer.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::{Activity, StateArea};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, simulate};
use xen_virtio_tests::{BlkRequest, Staged, driver};
use xen_virtio_transport::{DeviceState, GuestDevices, Hypervisor, MmioDevice, Register};

/// A guest's machine with one disk.
fn machine<H: Hypervisor>(hypervisor: H) -> GuestDevices<H> {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    let disk = Disk::open(file.path(), false).unwrap();
    let blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap();
    let state = DeviceState::private().unwrap();
    let mode = AddressMode::Grants;
    let device = MmioDevice::new(Box::new(blk), &hypervisor, mode, FIRST_IRQ, state).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    machine.add(FIRST_DEVICE, device).unwrap();
    machine
}

#[test]
fn a_handler_is_waited_for_a_moment_and_no_longer() {
    let (hypervisor, guest) = simulate(64).unwrap();
    let hidden = Rc::new(Cell::new(0));
    let still_hidden = Rc::clone(&hidden);
    let mut machine = machine(Staged::new(
        hypervisor,
        move |hypervisor| match still_hidden.get() {
            0 => hypervisor.next_trap(),
            count => {
                still_hidden.set(count - 1);
                None
            }
        },
    ));
    let (go, told) = channel();
    let handler = {
        let guest = guest.clone();
        thread::spawn(move || {
            let driver = driver(&guest, 0);
            let mut queue = driver.start(16);
            let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true);
            request.describe(&queue, 0);
            queue.offer(0);
            driver.notify(0);
            for () in told {
                let status = driver.read(Register::InterruptStatus);
                assert_eq!(status, VIRTIO_MMIO_INT_VRING);
            }
        })
    };
    while guest.interrupts(FIRST_IRQ) == 0 {
        machine.step();
    }
    // The handler comes a little later than the worker looks.
    let late_access = |machine: &mut GuestDevices<_>| {
        go.send(()).unwrap();
        thread::sleep(Duration::from_millis(50));
        hidden.set(1);
        machine.step()
    };
    assert_eq!(
        late_access(&mut machine),
        Activity::Working,
        "it is waited for"
    );
    // It has read why it was called, and does not acknowledge it.
    hidden.set(u32::MAX);
    assert_eq!(machine.step(), Activity::Idle);
    assert_eq!(
        late_access(&mut machine),
        Activity::Idle,
        "it is not waited for any more"
    );
    assert_eq!(machine.step(), Activity::Working);
    drop(go);
    handler.join().unwrap();
}
