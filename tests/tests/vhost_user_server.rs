//! Devices of ours at a vhost-user socket: our own frontend uses them, and VMMs that do not know what they do.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::vhost_user::Class;
use xen_virtio_backend::{Device, DeviceType, OneByOne, RingStock, StateArea};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::SimMachine;
use xen_virtio_tests::{BlkRequest, Echo, Reconnecting, driver};
use xen_virtio_transport::vhost_user_server::serve;

/// Serves what `make` makes at a socket in `directory`, until the test ends.
fn serve_at(directory: &Path, make: impl FnOnce() -> Box<dyn Device> + Send + 'static) {
    let listener = UnixListener::bind(directory.join("socket")).unwrap();
    std::thread::spawn(move || serve(make(), &listener));
}

fn disk(directory: &Path) -> impl FnOnce() -> Box<dyn Device> + Send + 'static {
    let image = directory.join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    move || {
        let disk = Disk::open(&image, false).unwrap();
        let kept = StateArea::private(Blk::KEPT).unwrap();
        Box::new(Blk::new(disk, [0; 20], 2, kept, &RingStock::new(1)).unwrap())
    }
}

#[test]
fn a_disk_of_ours_serves_a_frontend_of_ours() {
    let directory = TempDir::new().unwrap();
    serve_at(directory.path(), disk(directory.path()));
    let socket = directory.path().join("socket");
    let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
        let class = Class::of(DeviceType::BLOCK).expect("disks");
        Ok(vec![
            Box::new(Reconnecting::new(&socket, class)?) as Box<dyn Device>
        ])
    })
    .unwrap();
    let driver = driver(&guest, 0);
    // A driver, and the next one, which begins where the last one did.
    for round in 1..=3u8 {
        let mut queue = driver.start(64);
        for sector in 0..40 {
            let written = BlkRequest::new(&driver, VIRTIO_BLK_T_OUT, sector, 512, false);
            written.data.write(0, &[round; 512]);
            assert_eq!(written.perform(&driver, &mut queue).0, 0);
            let read = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, sector, 512, true);
            assert_eq!(read.perform(&driver, &mut queue), (0, 513));
            assert_eq!(read.data.read(), [round; 512]);
        }
        let flush = BlkRequest::new(&driver, VIRTIO_BLK_T_FLUSH, 0, 0, false);
        assert_eq!(flush.perform(&driver, &mut queue).0, 0);
    }
    machine.stop().unwrap();
    let image = std::fs::read(directory.path().join("image")).unwrap();
    assert!(image[..40 * 512].iter().all(|byte| *byte == 3));
}

/// Where the VMM of these tests has its guest's memory, as the guest and as itself.
const GUEST: u64 = 0x4000_0000;
const OURS: u64 = 0x7f00_0000_0000;
const LEN: u64 = 1 << 16;
const SIZE: u16 = 8;
/// Where the guest has its rings and a buffer.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x3000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A VMM, and the guest's memory.
struct Vmm {
    frontend: Frontend,
    memory: File,
    call: EventFd,
    kick: EventFd,
    error: EventFd,
    offered: u16,
}

impl Vmm {
    fn connect(directory: &Path) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut frontend = Frontend::connect(directory.join("socket"), 8).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert!(features & 1 << 30 != 0);
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = File::from(memory.unwrap());
        memory.set_len(LEN).unwrap();
        Self {
            frontend,
            memory,
            call: event(),
            kick: event(),
            error: event(),
            offered: 0,
        }
    }

    fn table(&self, len: u64) -> bool {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: len,
            userspace_addr: OURS,
            mmap_offset: 0,
            mmap_handle: self.memory.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).is_ok()
    }

    fn accept(&self) {
        // VIRTIO_F_VERSION_1, and that the protocol's features are used.
        self.frontend.set_features(1 << 32 | 1 << 30).unwrap();
    }

    fn addresses(&self, first: u64) -> bool {
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: first,
            used_ring_addr: OURS + USED,
            avail_ring_addr: OURS + AVAILABLE,
            log_addr: None,
        };
        self.frontend.set_vring_addr(0, &config).is_ok()
    }

    /// Starts the queue where it was left.
    fn start(&mut self, base: u16) {
        self.accept();
        assert!(self.table(LEN));
        self.frontend.set_vring_num(0, SIZE).unwrap();
        self.frontend.set_vring_base(0, base).unwrap();
        assert!(self.addresses(OURS));
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_err(0, &self.error).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
        self.offered = base;
    }

    fn write(&self, place: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, place).unwrap();
    }

    fn read<const N: usize>(&self, place: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, place).unwrap();
        bytes
    }

    fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let bytes = [
            &address.to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.write(16 * index, &bytes.concat());
    }

    fn used(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2))
    }

    /// Describes a request to echo `sent` from `address` of the guest's memory.
    fn describe(&self, sent: &[u8; 4], address: u64) {
        self.write(DATA, sent);
        self.write(DATA + 0x100, &[0; 4]);
        self.descriptor(0, address, 4, NEXT, 1);
        self.descriptor(1, GUEST + DATA + 0x100, 4, WRITE, 0);
    }

    /// Offers what is described.
    fn offer(&mut self) {
        let slot = u64::from(self.offered % SIZE);
        self.write(AVAILABLE + 4 + 2 * slot, &[0, 0]);
        self.offered += 1;
        self.write(AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    /// Whether what was offered comes back as `sent`; not, if the device fails.
    fn is_answered(&self, sent: &[u8; 4]) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while self.used() != self.offered {
            if self.error.read().is_ok() {
                return false;
            }
            assert!(Instant::now() < end, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(self.call.read().is_ok(), "the guest was not told");
        self.read(DATA + 0x100) == *sent
    }

    fn echo(&mut self, sent: &[u8; 4], address: u64) -> bool {
        self.describe(sent, address);
        self.offer();
        self.kick.write(1).unwrap();
        self.is_answered(sent)
    }
}

fn echo_at(directory: &Path) {
    serve_at(directory, || Box::new(OneByOne::new(Echo::new().unwrap())));
}

#[test]
fn a_queue_goes_on_where_it_was_stopped() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    let mut vmm = Vmm::connect(directory.path());
    assert_eq!(vmm.frontend.get_queue_num().unwrap(), 1);
    let mut base = 0;
    for round in 1..=3u8 {
        vmm.start(base);
        for count in 0..11 {
            assert!(vmm.echo(&[round, count, 3, 4], GUEST + DATA));
        }
        // As a VMM does that pauses its guest.
        let next = vmm.frontend.get_vring_base(0).unwrap();
        assert_eq!(next, 11 * u32::from(round));
        base = u16::try_from(next).unwrap();
    }
    drop(vmm);
    // Another one finds the device as the first one did.
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    assert!(vmm.echo(b"next", GUEST + DATA));
}

/// QEMU's disk of Debian 13 gives its queues 1024 entries.
#[test]
fn a_vmm_says_how_large_a_queue_is() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    for (size, is_taken) in [(1, true), (1024, true), (1000, false)] {
        let vmm = Vmm::connect(directory.path());
        assert_eq!(
            vmm.frontend.set_vring_num(0, size).is_ok(),
            is_taken,
            "{size}"
        );
    }
}

/// As QEMU's disk: what has been completed before there was anybody to tell is told then.
#[test]
fn a_call_that_comes_late_is_called() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    vmm.frontend.get_vring_base(0).unwrap();
    vmm.describe(b"late", GUEST + DATA);
    vmm.offer();
    vmm.frontend.set_vring_kick(0, &vmm.kick).unwrap();
    vmm.frontend.set_vring_enable(0, true).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while vmm.used() != 1 {
        assert!(Instant::now() < end, "no answer");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(vmm.call.read().is_err());
    vmm.frontend.set_vring_call(0, &vmm.call).unwrap();
    assert!(vmm.call.read().is_ok());
}

#[test]
fn a_queue_that_is_disabled_is_not_served() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    assert!(vmm.echo(b"well", GUEST + DATA));
    vmm.frontend.set_vring_enable(0, false).unwrap();
    vmm.describe(b"late", GUEST + DATA);
    vmm.offer();
    vmm.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.used(), 1);
    vmm.frontend.set_vring_enable(0, true).unwrap();
    assert!(vmm.is_answered(b"late"));
}

/// A reset of the guest's reaches a VMM as the end of its queues, and the next driver is served by the same connection.
#[test]
fn a_device_that_has_failed_gives_its_queue_back() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    assert!(vmm.echo(b"well", GUEST + DATA));
    // A chain that loops.
    vmm.descriptor(0, GUEST + DATA, 4, NEXT, 0);
    vmm.offer();
    vmm.kick.write(1).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while vmm.error.read().is_err() {
        assert!(Instant::now() < end, "it has not failed");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1);
    for ring in [AVAILABLE, USED] {
        vmm.write(ring, &[0; 4]);
    }
    vmm.start(0);
    assert!(vmm.echo(b"well", GUEST + DATA));
}

#[test]
fn what_lies_outside_the_table_is_refused() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    // Who does one of these is told, and not listened to any more.
    let refused = |wrong: &dyn Fn(&Vmm) -> bool| {
        let vmm = Vmm::connect(directory.path());
        vmm.accept();
        assert!(vmm.table(LEN));
        assert!(!wrong(&vmm));
        assert!(!vmm.table(LEN));
    };
    // More than the file has.
    refused(&|vmm| vmm.table(LEN + 1));
    // Rings where nothing is shared, and in the guest's place rather than the VMM's.
    for first in [OURS + LEN, OURS - 16, GUEST, u64::MAX - 15] {
        refused(&|vmm| vmm.addresses(first));
    }
    refused(&|vmm| vmm.frontend.set_vring_num(0, 2048).is_ok());
    refused(&|vmm| vmm.frontend.set_vring_num(1, SIZE).is_ok());
    // A ring that runs out of it: the device fails, and works again when it is set up well.
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    assert!(vmm.echo(b"good", GUEST + DATA));
    vmm.frontend.get_vring_base(0).unwrap();
    assert!(vmm.addresses(OURS + LEN - 16));
    vmm.frontend.set_vring_base(0, 0).unwrap();
    vmm.frontend.set_vring_kick(0, &vmm.kick).unwrap();
    vmm.frontend.set_vring_enable(0, true).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while vmm.error.read().is_err() {
        assert!(Instant::now() < end, "a queue runs that lies outside");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(vmm);
    let mut vmm = Vmm::connect(directory.path());
    vmm.start(0);
    assert!(vmm.echo(b"good", GUEST + DATA));
    // A buffer outside: the request comes back with nothing in it.
    for outside in [GUEST + LEN - 2, GUEST - 2, OURS, u64::MAX - 1] {
        assert!(!vmm.echo(b"lost", outside), "{outside:#x}");
    }
    assert!(vmm.echo(b"well", GUEST + DATA));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let directory = TempDir::new().unwrap();
    echo_at(directory.path());
    for features in [1 << 30, 1 << 32 | 1 << 30 | 1 << 28, 1 << 32 | 1 << 33] {
        let vmm = Vmm::connect(directory.path());
        let accepted = vmm.frontend.set_features(features);
        assert!(accepted.is_err(), "{features:#x}");
    }
    let mut vmm = Vmm::connect(directory.path());
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = vmm.frontend.get_config(0, 16, flags, &[0; 16]).unwrap();
    assert_eq!(config, [0; 16]);
    vmm.start(0);
    assert!(vmm.echo(b"well", GUEST + DATA));
}
