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
use xen_virtio_backend::{
    Activity, Device, DeviceError, Identity, QueueError, QueueIndex, QueueStart, RequestCounters,
    StateArea, Step,
};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, simulate};
use xen_virtio_tests::{BlkRequest, Staged, driver};
use xen_virtio_transport::{DeviceState, GuestDevices, Hypervisor, MmioDevice, Register};

fn disk() -> Blk {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    let disk = Disk::open(file.path(), false).unwrap();
    Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap()
}

/// Does all that a disk does when it is told to prepare for a sleep.
struct OnlyBeforeSleep(Blk);

impl Device for OnlyBeforeSleep {
    fn identity(&self) -> &Identity {
        self.0.identity()
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.0.start_queue(index, start, access)
    }

    fn step(&mut self, _: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        Ok(Step::default())
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        self.0.step(access)
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.0.close_queue(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.0.stop_queue(index);
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn counters(&self) -> RequestCounters {
        self.0.counters()
    }
}

/// A guest's machine with one device.
fn machine<H: Hypervisor>(hypervisor: H, device: Box<dyn Device>) -> GuestDevices<H> {
    let state = DeviceState::private().unwrap();
    let mode = AddressMode::Grants;
    let device = MmioDevice::new(device, &hypervisor, mode, FIRST_IRQ, state).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    machine.add(FIRST_DEVICE, device).unwrap();
    machine
}

#[test]
fn a_handler_is_waited_for_a_moment_and_no_longer() {
    waits_for_a_moment(Box::new(disk()));
}

#[test]
fn so_is_one_that_is_interrupted_before_a_sleep() {
    waits_for_a_moment(Box::new(OnlyBeforeSleep(disk())));
}

fn waits_for_a_moment(device: Box<dyn Device>) {
    let (hypervisor, guest) = simulate(64).unwrap();
    let hidden = Rc::new(Cell::new(0));
    let still_hidden = Rc::clone(&hidden);
    let staged = Staged::new(hypervisor, move |hypervisor| match still_hidden.get() {
        0 => hypervisor.next_trap(),
        count => {
            still_hidden.set(count - 1);
            None
        }
    });
    let mut machine = machine(staged, device);
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
    let is_interrupted = || guest.interrupts(FIRST_IRQ) > 0;
    while !is_interrupted() {
        machine.step();
        if !is_interrupted() {
            machine.prepare_sleep().unwrap();
        }
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
