//! The worker: one process for one guest, which does all that guest-written memory has a say in.

use crate::ipc::{Channel, FromWorker, ToWorker};
use crate::libxl::EntryKey;
use crate::server::Server;
use anyhow::{Context, Result, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use xen_virtio_backend::blk::{Blk, Disk, Serial};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::{EventChannels, XenGuest};
use xen_virtio_transport::{Hypervisor, MmioDevice, MmioRange, Slot};

const SUPERVISOR: Token = Token(0);

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
    let server = match start(&channel) {
        Ok(server) => server,
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
        server,
        slots: BTreeMap::new(),
        supervised: true,
    }
    .serve()
}

fn start(channel: &Channel) -> Result<Server<XenGuest>> {
    wait_readable(channel)?;
    let (message, fds) = channel.receive()?.context("the supervisor sent nothing")?;
    let ToWorker::Start {
        domid,
        poll_limit_us,
    } = message
    else {
        bail!("the supervisor began with {message:?}")
    };
    let [privcmd, evtchn, gntdev] = <[OwnedFd; 3]>::try_from(fds)
        .map_err(|fds| anyhow!("{} descriptors instead of 3", fds.len()))?;
    crate::sandbox::enter(domid).context("going into the sandbox")?;
    let domid = Domid(domid);
    let privcmd = Privcmd::new(privcmd.into(), domid);
    let evtchn = EventChannels::new(evtchn.into(), domid);
    let guest = XenGuest::new(privcmd, File::from(gntdev), evtchn)?;
    Ok(Server::new(guest, Duration::from_micros(poll_limit_us))?)
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
    /// Dropped before `channel`: when the supervisor sees that end, nothing is in flight any more.
    server: Server<XenGuest>,
    channel: Channel,
    slots: BTreeMap<EntryKey, Slot>,
    /// Whether the supervisor is still there. Without it the guest is served on as it is.
    supervised: bool,
}

impl Worker {
    fn serve(mut self) -> Result<()> {
        let supervisor = self.channel.as_fd().as_raw_fd();
        self.server.registry().register(
            &mut SourceFd(&supervisor),
            SUPERVISOR,
            Interest::READABLE,
        )?;
        let mut checked = Instant::now();
        loop {
            // Without a supervisor nobody else would tell that the guest is gone.
            let timeout = (!self.supervised).then_some(ORPHAN_CHECK);
            self.server.serve(timeout)?;
            if !self.supervised && checked.elapsed() >= ORPHAN_CHECK {
                if !self.server.hypervisor().is_alive() {
                    return Ok(());
                }
                checked = Instant::now();
            }
            if self.supervised && self.server.is_ready(SUPERVISOR) {
                if self.obey()? {
                    return Ok(());
                }
                if !self.supervised {
                    self.server
                        .registry()
                        .deregister(&mut SourceFd(&supervisor))?;
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
                ToWorker::Start { domid, .. } => bail!("told to start again, for guest {domid}"),
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
                        self.server.remove(slot);
                    }
                    FromWorker::Detached { key }
                }
                ToWorker::Report => FromWorker::Report {
                    server: self.server.report(),
                    devices: self
                        .slots
                        .iter()
                        .filter_map(|(key, slot)| Some((*key, self.server.device(*slot)?)))
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
        let hypervisor = self.server.hypervisor();
        let queues = hypervisor.vcpus().min(MAX_DISK_QUEUES);
        let blk = Blk::new(disk, padded(serial), queues.try_into()?)?;
        let access = hypervisor.guest_access(mode);
        let line = hypervisor.interrupt_line(irq);
        Ok(self
            .server
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
