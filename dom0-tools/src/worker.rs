//! The worker: one process for one guest, which does all that guest-written memory has a say in.

use crate::ipc::{Channel, FromWorker, ToWorker};
use crate::libxl::EntryKey;
use anyhow::{Context, Result, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use xen_virtio_backend::blk::{Blk, Disk, Serial};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::{EventChannels, XenGuest};
use xen_virtio_transport::{Hypervisor, Machine, MmioDevice, MmioRange, Slot};

const TRAPS: Token = Token(0);
const SUPERVISOR: Token = Token(1);

/// How often a worker without a supervisor looks whether its guest still lives.
const ORPHAN_CHECK: Duration = Duration::from_secs(1);

/// Queues of a disk: one a vCPU up to this many. More than that the one thread does not gain from.
const MAX_DISK_QUEUES: usize = 4;

/// Serves the guest that the supervisor names over `socket`, until it is gone.
///
/// # Errors
///
/// What keeps the guest from being served; the supervisor is told too.
pub fn run(socket: OwnedFd) -> Result<()> {
    let channel = Channel::new(socket);
    let guest = match start(&channel) {
        Ok(guest) => guest,
        Err(error) => {
            // The supervisor logs it, with the guest's name.
            channel.send(
                &FromWorker::Failed {
                    error: format!("{error:#}"),
                },
                &[],
            )?;
            return Ok(());
        }
    };
    Worker {
        channel,
        machine: Machine::new(guest),
        slots: BTreeMap::new(),
        supervised: true,
    }
    .serve()
}

fn start(channel: &Channel) -> Result<XenGuest> {
    wait_readable(channel)?;
    let (message, fds) = channel.receive()?.context("the supervisor sent nothing")?;
    let ToWorker::Start { domid } = message else {
        bail!("the supervisor began with {message:?}")
    };
    let [privcmd, evtchn, gntdev] = <[OwnedFd; 3]>::try_from(fds)
        .map_err(|fds| anyhow!("{} descriptors instead of 3", fds.len()))?;
    let domid = Domid(domid);
    let privcmd = Privcmd::new(privcmd.into(), domid);
    let evtchn = EventChannels::new(evtchn.into(), domid);
    Ok(XenGuest::new(privcmd, File::from(gntdev), evtchn)?)
}

fn wait_readable(channel: &Channel) -> io::Result<()> {
    let mut fds = [rustix::event::PollFd::new(
        channel,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None)?;
    Ok(())
}

struct Worker {
    channel: Channel,
    machine: Machine<XenGuest>,
    slots: BTreeMap<EntryKey, Slot>,
    /// Whether the supervisor is still there. Without it the guest is served on as it is.
    supervised: bool,
}

impl Worker {
    fn serve(mut self) -> Result<()> {
        let mut poll = Poll::new()?;
        let traps = self.machine.hypervisor().events().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&traps), TRAPS, Interest::READABLE)?;
        let supervisor = self.channel.as_fd().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&supervisor), SUPERVISOR, Interest::READABLE)?;
        let mut events = Events::with_capacity(8);
        let mut more = false;
        let mut checked = Instant::now();
        loop {
            let timeout = match (more, self.supervised) {
                (true, _) => Some(Duration::ZERO),
                (false, true) => None,
                // Nobody else would tell that the guest is gone.
                (false, false) => Some(ORPHAN_CHECK),
            };
            match poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error.into());
                }
                _ => {}
            }
            // Traps first, and never left out: an edge that was seen while `more` was set is not seen again.
            self.machine.hypervisor().clear_events()?;
            more = self.machine.turn();
            if !self.supervised && checked.elapsed() >= ORPHAN_CHECK {
                if !self.machine.hypervisor().is_alive() {
                    return Ok(());
                }
                checked = Instant::now();
            }
            if self.supervised && events.iter().any(|event| event.token() == SUPERVISOR) {
                if self.obey()? {
                    return Ok(());
                }
                if !self.supervised {
                    poll.registry().deregister(&mut SourceFd(&supervisor))?;
                }
            }
        }
    }

    /// Does what the supervisor asks. True when it asks to stop.
    fn obey(&mut self) -> Result<bool> {
        loop {
            let (message, fds) = match self.channel.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(error.into());
                }
                Err(_) => {
                    self.lose_supervisor();
                    return Ok(false);
                }
            };
            let answer = match message {
                ToWorker::Start { domid } => bail!("told to start again, for guest {domid}"),
                ToWorker::AttachDisk {
                    key,
                    base,
                    len,
                    irq,
                    grant_usage,
                    read_only,
                    serial,
                } => {
                    let range = MmioRange { base, len };
                    let mode = if grant_usage {
                        AddressMode::Grants
                    } else {
                        AddressMode::Frames
                    };
                    match self.attach_disk(range, irq, mode, read_only, &serial, fds) {
                        Ok(slot) => {
                            self.slots.insert(key, slot);
                            FromWorker::Attached { key }
                        }
                        Err(error) => FromWorker::AttachFailed {
                            key,
                            error: format!("{error:#}"),
                        },
                    }
                }
                ToWorker::Detach { key } => {
                    if let Some(slot) = self.slots.remove(&key) {
                        self.machine.remove(slot);
                    }
                    FromWorker::Detached { key }
                }
                ToWorker::Report => FromWorker::Report {
                    devices: self
                        .slots
                        .iter()
                        .filter_map(|(key, slot)| {
                            Some((*key, self.machine.device(*slot)?.report()))
                        })
                        .collect(),
                },
                ToWorker::Stop => return Ok(true),
            };
            if self.channel.send(&answer, &[]).is_err() {
                self.lose_supervisor();
                return Ok(false);
            }
        }
    }

    fn lose_supervisor(&mut self) {
        tracing::warn!("the supervisor is gone; the guest is served on as it is");
        self.supervised = false;
    }

    fn attach_disk(
        &mut self,
        range: MmioRange,
        irq: u32,
        mode: AddressMode,
        read_only: bool,
        serial: &str,
        fds: Vec<OwnedFd>,
    ) -> Result<Slot> {
        let file = fds
            .into_iter()
            .next()
            .context("no descriptor came with the disk")?;
        let disk = Disk::from_file(file.into(), read_only)?;
        let hypervisor = self.machine.hypervisor();
        let queues = hypervisor.vcpus().min(MAX_DISK_QUEUES);
        let blk = Blk::new(disk, padded(serial), queues.try_into()?);
        let access = hypervisor.guest_access(mode);
        let line = hypervisor.interrupt_line(irq);
        Ok(self
            .machine
            .add(range, MmioDevice::new(Box::new(blk), mode, access, line))?)
    }
}

/// The first bytes of `text`, as many as a serial number has.
fn padded(text: &str) -> Serial {
    let mut serial = Serial::default();
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}
