//! Interfaces for the simulator: one whose other end a test has, and one that has a frame whenever it is asked.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, ReadVolatile, VolatileSlice, WriteVolatile};
use xen_virtio_backend::StateCell;
use xen_virtio_backend::net::{Interface, Net, Setup};
use xen_virtio_backend::{Device, Limits, StateArea};

/// The address of the device that [`network`] makes.
pub const MAC: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 1];

/// No offloads.
const NOTHING_SAID: u64 = u64::MAX;

/// A queue of an interface, whose frames are datagrams.
struct Datagrams {
    socket: UnixDatagram,
    offloads: Arc<AtomicU64>,
}

/// The other end of an interface.
pub struct Wire {
    socket: UnixDatagram,
    /// What the driver takes, as the interface was told last.
    offloads: Arc<AtomicU64>,
}

impl Wire {
    /// A wire, and the queue of an interface at its end.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> io::Result<(Self, Box<dyn Interface + Send>)> {
        let (socket, other) = UnixDatagram::pair()?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        other.set_nonblocking(true)?;
        let offloads = Arc::new(AtomicU64::new(NOTHING_SAID));
        let interface = Datagrams {
            socket: other,
            offloads: Arc::clone(&offloads),
        };
        Ok((Self { socket, offloads }, Box::new(interface)))
    }

    /// Sends the guest a frame with its header; waits while the interface is full.
    ///
    /// # Panics
    ///
    /// If the interface is gone.
    pub fn send(&self, frame: &[u8]) {
        self.socket.send(frame).expect("an interface");
    }

    /// The next frame of the guest's, with its header.
    ///
    /// # Panics
    ///
    /// If none comes.
    pub fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 1 << 17];
        let len = self.socket.recv(&mut frame).expect("a frame");
        frame.truncate(len);
        frame
    }

    /// The next frame of the guest's, if there is one.
    ///
    /// # Panics
    ///
    /// If the interface is gone.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        self.socket.set_nonblocking(true).expect("a socket");
        let mut frame = vec![0; 1 << 17];
        let received = self.socket.recv(&mut frame);
        self.socket.set_nonblocking(false).expect("a socket");
        frame.truncate(received.ok()?);
        Some(frame)
    }

    /// What the driver takes, as the interface was told last, if it was.
    pub fn offloads(&self) -> Option<u64> {
        let bits = self.offloads.load(Ordering::SeqCst);
        (bits != NOTHING_SAID).then_some(bits)
    }
}

impl Interface for Datagrams {
    fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<usize> {
        let mut socket = self.socket.as_fd();
        socket.read_volatile(to).map_err(of_system)
    }

    fn write(&mut self, frame: &VolatileSlice<'_>) -> io::Result<()> {
        let mut socket = self.socket.as_fd();
        socket.write_volatile(frame).map(drop).map_err(of_system)
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn set_offloads(&mut self, accepted: u64) -> io::Result<()> {
        self.offloads.store(accepted, Ordering::SeqCst);
        Ok(())
    }

    fn set_used(&mut self, _is_used: bool) -> io::Result<()> {
        Ok(())
    }
}

fn of_system(error: vm_memory::VolatileMemoryError) -> io::Error {
    match error {
        vm_memory::VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

/// An interface that has this frame whenever it is asked, and takes any.
pub struct Flood {
    frame: Vec<u8>,
    ready: OwnedFd,
}

impl Flood {
    /// # Errors
    ///
    /// The system's.
    pub fn new(frame: Vec<u8>) -> io::Result<Self> {
        let ready = eventfd(1, EventfdFlags::CLOEXEC)?;
        Ok(Self { frame, ready })
    }
}

impl Interface for Flood {
    fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<usize> {
        let len = self.frame.len().min(to.len());
        let written = to.write_slice(&self.frame[..len], 0);
        written.map_err(io::Error::other)?;
        Ok(len)
    }

    fn write(&mut self, _frame: &VolatileSlice<'_>) -> io::Result<()> {
        Ok(())
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn set_offloads(&mut self, _accepted: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_used(&mut self, _is_used: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A network device on these queues of an interface, that keeps what its driver sets in `kept`, and whose cable is plugged in or
/// not.
///
/// # Errors
///
/// If the system has not the memory.
pub fn network(
    interfaces: Vec<Box<dyn Interface>>,
    [sends, receives]: [Limits; 2],
    kept: StateArea,
    is_up: bool,
) -> io::Result<Box<dyn Device>> {
    let setup = Setup {
        mac: MAC,
        mtu: Some(1500),
        segments_udp: true,
        sends,
        receives,
    };
    let net = Net::new(setup, interfaces, StateCell::new(kept), is_up)?;
    Ok(Box::new(net))
}
