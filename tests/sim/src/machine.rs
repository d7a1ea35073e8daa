//! A simulated guest's machine: what serves it, in a thread of its own.

use crate::hypervisor::{SimGuest, SimHypervisor, simulate};
use anyhow::{Context, Result};
use mio::{Token, Waker};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;
use xen_virtio_backend::Device;
use xen_virtio_dom0_tools::worker::event_loop::EventLoop;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_transport::{DeviceReport, DeviceState, MmioDevice, MmioRange};

/// Where the simulated guest's first device is, and its interrupt: where libxl puts a guest's first.
pub const FIRST_DEVICE: MmioRange = MmioRange {
    base: 0x0200_0000,
    len: 0x200,
};
pub const FIRST_IRQ: u32 = 33;

/// Of which only those that are used take memory: what a driver gives back is not used again.
const GUEST_FRAMES: usize = 16384;
/// The simulated guest is a thread, and answers soon.
const POLL_LIMIT: Duration = Duration::from_micros(50);

/// Serves a simulated guest as a worker serves a real one.
pub struct SimMachine {
    thread: Thread,
    stop: Waker,
}

type Thread = JoinHandle<std::io::Result<Vec<DeviceReport>>>;

const STOP: Token = Token(0);

impl SimMachine {
    /// A guest with the devices that `devices` makes, in the machine's thread: the first at
    /// [`FIRST_DEVICE`] with [`FIRST_IRQ`], the others behind it.
    ///
    /// # Errors
    ///
    /// If this machine has not the memory, threads or descriptors.
    pub fn start(
        mode: AddressMode,
        devices: impl FnOnce() -> std::io::Result<Vec<Box<dyn Device>>> + Send + 'static,
    ) -> Result<(SimGuest, Self)> {
        let (hypervisor, guest) = simulate(GUEST_FRAMES)?;
        let (sender, receiver) = sync_channel(1);
        let thread = std::thread::spawn(move || {
            let server = EventLoop::new(hypervisor, POLL_LIMIT, 100)?;
            // Whoever waits for the waker waits still.
            let _ = sender.send(Waker::new(server.registry(), STOP)?);
            serve(server, devices()?, mode)
        });
        match receiver.recv() {
            Ok(stop) => Ok((guest, Self { thread, stop })),
            Err(_) => Err(join(thread).err().context("the machine did not start")?),
        }
    }

    /// Ends the machine once it has nothing to do; what its devices report at the end.
    ///
    /// # Errors
    ///
    /// What kept it from running.
    pub fn stop(self) -> Result<Vec<DeviceReport>> {
        self.stop.wake()?;
        join(self.thread)
    }
}

fn join(thread: Thread) -> Result<Vec<DeviceReport>> {
    let ended = thread.join();
    Ok(ended.map_err(|_| anyhow::anyhow!("the machine's thread panicked"))??)
}

fn serve(
    mut server: EventLoop<SimHypervisor>,
    devices: Vec<Box<dyn Device>>,
    mode: AddressMode,
) -> std::io::Result<Vec<DeviceReport>> {
    let mut slots = Vec::new();
    for ((device, base), irq) in devices
        .into_iter()
        .zip((FIRST_DEVICE.base..).step_by(0x200))
        .zip(FIRST_IRQ..)
    {
        let state = DeviceState::private()?;
        let device = MmioDevice::new(device, server.hypervisor(), mode, irq, state);
        let device = device.map_err(std::io::Error::other)?;
        let range = MmioRange {
            base,
            ..FIRST_DEVICE
        };
        slots.push(server.add(range, device).map_err(std::io::Error::other)?);
    }
    loop {
        server.serve(None)?;
        if server.is_ready(STOP) {
            return Ok(slots
                .into_iter()
                .filter_map(|slot| server.device(slot))
                .collect());
        }
    }
}
