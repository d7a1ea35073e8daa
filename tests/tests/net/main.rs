//! The network device, by the one driver and on a wire whose other end is the test's.

mod control;
mod frames;
mod framing;
mod worker;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as ids;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_backend::net::{Interface, Net};
use xen_virtio_backend::{Limits, StateArea};
use xen_virtio_dom0_tools::guest_state::DeviceRecords;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{
    FIRST_DEVICE, FIRST_IRQ, Fault, SimGuest, SimHypervisor, SimMachine, simulate,
};
use xen_virtio_tests::net::{
    HEADER, RECEIVE, SEND, SIZE, command, cuts, frame, joined, post, post_in_pieces, send, start,
};
use xen_virtio_tests::{
    Buffer, Driver, Flood, MAC, MakeDevice, NEXT, Negotiated, RawQueue, WRITE, Wire, come_to_rest,
    drive, drive_over_deaths, driver, network, sleeps,
};
use xen_virtio_transport::{DeviceReport, DeviceState, GuestDevices, MmioDevice, Register, Width};

const OTHER: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 9];
const BROADCAST: [u8; 6] = [0xff; 6];
const NO_LIMITS: [Limits; 2] = [Limits {
    bytes: None,
    operations: None,
    burst_seconds: 0,
}; 2];
/// Features without which a driver has none of the offloads.
const PLAIN: u64 = 1 << ids::VIRTIO_NET_F_GUEST_CSUM | 1 << ids::VIRTIO_NET_F_CSUM;
const MERGED: u64 = 1 << ids::VIRTIO_NET_F_MRG_RXBUF;

/// A guest with a network device, whose pairs of queues have these wires.
struct Bench {
    guest: SimGuest,
    machine: SimMachine,
    driver: Driver,
    wires: Vec<Wire>,
}

impl Bench {
    fn new(pairs: u16, limits: [Limits; 2]) -> Self {
        let (wires, interfaces): (Vec<_>, Vec<_>) =
            (0..pairs).map(|_| Wire::new().unwrap()).unzip();
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            let kept = StateArea::private(Net::kept_bytes(pairs))?;
            let interfaces = interfaces.into_iter().map(|one| one as Box<dyn Interface>);
            Ok(vec![network(interfaces.collect(), limits, kept, true)?])
        })
        .unwrap();
        Self {
            driver: driver(&guest, 0),
            guest,
            machine,
            wires,
        }
    }

    /// A running device of a driver that has accepted all but `without`, and a queue for each of `queues`.
    fn start<const N: usize>(&self, without: u64, queues: [u32; N]) -> [RawQueue; N] {
        start(&self.driver, without, queues)
    }

    fn end(self) -> DeviceReport {
        let mut reports = self.machine.stop().unwrap();
        assert_eq!(reports.len(), 1);
        reports.remove(0)
    }
}

fn status(driver: &Driver) -> u64 {
    driver.raw_read(0x106, Width::Two)
}
