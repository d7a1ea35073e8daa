//! Interrupt handlers are waited for: a moment, and no longer.

use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::{Activity, StateArea};
use xen_virtio_dom0_tools::demo::{FIRST_DEVICE, FIRST_IRQ};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};
use xen_virtio_tests::{BlkRequest, driver};
use xen_virtio_transport::sim::{SimHypervisor, simulate};
use xen_virtio_transport::{
    DeviceState, Hypervisor, InterruptLine, Machine, MmioDevice, MmioRange, Register, Trap,
};

/// Finds no trap when it first looks.
struct Late {
    hypervisor: SimHypervisor,
    hidden: Rc<Cell<u32>>,
}

impl Hypervisor for Late {
    fn next_trap(&mut self) -> Option<Trap<'_>> {
        match self.hidden.get() {
            0 => self.hypervisor.next_trap(),
            count => {
                self.hidden.set(count - 1);
                None
            }
        }
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.hypervisor.events()
    }

    fn clear_events(&mut self) -> io::Result<()> {
        self.hypervisor.clear_events()
    }

    fn claim(&mut self, range: MmioRange) -> io::Result<()> {
        self.hypervisor.claim(range)
    }

    fn interrupt_line(&self, number: u32) -> Box<dyn InterruptLine> {
        self.hypervisor.interrupt_line(number)
    }

    fn guest_access(&self, mode: AddressMode) -> Box<dyn GuestAccess> {
        self.hypervisor.guest_access(mode)
    }
}

/// A guest's machine with one disk.
fn machine(late: Late) -> Machine<Late> {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let kept = StateArea::private(8).unwrap();
    let blk = Blk::new(Disk::open(file.path(), false).unwrap(), [0; 20], 1, kept).unwrap();
    let mode = AddressMode::Grants;
    let (access, line) = (late.guest_access(mode), late.interrupt_line(FIRST_IRQ));
    let state = DeviceState::private().unwrap();
    let device = MmioDevice::new(Box::new(blk), mode, access, line, state).unwrap();
    let mut machine = Machine::new(late);
    machine.add(FIRST_DEVICE, device).unwrap();
    machine
}

#[test]
fn a_handler_is_waited_for_a_moment_and_no_longer() {
    let (hypervisor, guest) = simulate(64).unwrap();
    let hidden = Rc::new(Cell::new(0));
    let mut machine = machine(Late {
        hypervisor,
        hidden: Rc::clone(&hidden),
    });
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
        machine.turn();
    }
    // The handler comes a little later than the worker looks.
    let late_access = |machine: &mut Machine<Late>| {
        go.send(()).unwrap();
        thread::sleep(Duration::from_millis(50));
        hidden.set(1);
        machine.turn()
    };
    assert_eq!(
        late_access(&mut machine),
        Activity::Working,
        "it is waited for"
    );
    // It has read why it was called, and does not acknowledge it.
    hidden.set(u32::MAX);
    assert_eq!(machine.turn(), Activity::Idle);
    assert_eq!(
        late_access(&mut machine),
        Activity::Idle,
        "it is not waited for any more"
    );
    assert_eq!(machine.turn(), Activity::Working);
    drop(go);
    handler.join().unwrap();
}
