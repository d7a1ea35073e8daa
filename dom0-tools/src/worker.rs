//! The worker: one process for one guest, which does all that guest-written memory has a say in.

use crate::disk_lock::{self, LockError};
use crate::event_loop::EventLoop;
use crate::guest_state::{self, Backing, GuestState, Name};
use crate::ipc::{Channel, FromWorker, ToWorker};
use crate::libxl::{EntryKey, MAX_DEVICES};
use anyhow::{Context, Result, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use xen_virtio_backend::blk::{Blk, Claim, Disk, RingStock, Serial};
use xen_virtio_backend::{Device, DeviceType, StateArea};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::{EventChannels, XenGuest};
use xen_virtio_transport::{Hypervisor, MmioDevice, MmioRange, Slot};

const SUPERVISOR: Token = Token(0);

/// How often a worker without a supervisor looks whether its guest still lives, and one with leaving devices at those.
const ORPHAN_CHECK: Duration = Duration::from_secs(1);

/// Queues of a disk: one a vCPU up to this many. More than that the one thread does not gain from.
const MAX_DISK_QUEUES: usize = 4;

/// Bytes of the record of the size that a disk's driver was told of: zero if it was told of none.
const SHOWN: usize = 8;

/// Bytes that a disk keeps at most.
pub(crate) fn disk_state_bytes() -> usize {
    guest_state::device_bytes(&[Blk::KEPT, SHOWN], &[Blk::QUEUE_SIZE; MAX_DISK_QUEUES])
}

/// Serves the guest that the supervisor names over `socket`, until it is gone.
///
/// # Errors
///
/// What keeps the guest from being served; the supervisor is told too.
pub fn run(socket: OwnedFd) -> Result<()> {
    let channel = Channel::new(socket);
    let (event_loop, state, rings) = match start(&channel) {
        Ok(Some(started)) => started,
        Ok(None) => return Ok(()),
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
        event_loop,
        state,
        rings,
        slots: BTreeMap::new(),
        told: BTreeMap::new(),
        leaving: Vec::new(),
        begun: false,
        supervised: true,
    }
    .serve()
}

/// Takes what the supervisor hands over, and the guest from an earlier worker if there was one. `None` if
/// there is no supervisor any more.
fn start(channel: &Channel) -> Result<Option<(EventLoop<XenGuest>, GuestState, RingStock)>> {
    wait_readable(channel)?;
    let (message, fds) = channel.receive()?.context("the supervisor sent nothing")?;
    let ToWorker::Start {
        domid,
        poll_limit_us,
        cpu_percent,
    } = message
    else {
        bail!("the supervisor began with {message:?}")
    };
    let [privcmd, evtchn, gntdev, state] = <[OwnedFd; 4]>::try_from(fds)
        .map_err(|fds| anyhow!("{} descriptors instead of 4", fds.len()))?;
    let rings = crate::sandbox::enter(domid, || RingStock::new(MAX_DEVICES))
        .context("going into the sandbox")?;
    // The next supervisor ends the workers that it finds by their user, which this one has had since the
    // line before. Whose supervisor had ended by then ends by itself, before it touches the guest.
    if !channel.is_connected()? {
        return Ok(None);
    }
    let state = GuestState::map(&File::from(state))?;
    let domid = Domid(domid);
    let privcmd = Privcmd::new(privcmd.into(), domid);
    let evtchn = EventChannels::new(evtchn.into(), domid);
    let server = match state.server()? {
        Some(server) => server,
        None => {
            let server = XenGuest::create_server(&privcmd)?;
            state.set_server(server);
            server
        }
    };
    let guest = XenGuest::open(privcmd, File::from(gntdev), evtchn, server)?;
    let limit = Duration::from_micros(poll_limit_us);
    let event_loop = EventLoop::new(guest, limit, cpu_percent)?;
    Ok(Some((event_loop, state, rings)))
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
    event_loop: EventLoop<XenGuest>,
    channel: Channel,
    state: GuestState,
    /// A ring for each device that the guest can have: none can be made in the sandbox.
    rings: RingStock,
    slots: BTreeMap<EntryKey, Slot>,
    /// The records of what the drivers of disks were told.
    told: BTreeMap<EntryKey, StateArea>,
    /// Devices that were detached, and of which transfers are under way.
    leaving: Vec<(EntryKey, Box<dyn Device>)>,
    /// The guest may be answered: whatever device it knows is here.
    begun: bool,
    /// Whether the supervisor is still there. Without it the guest is served on as it is.
    supervised: bool,
}

impl Worker {
    fn serve(mut self) -> Result<()> {
        while !self.begun {
            wait_readable(&self.channel)?;
            if self.handle_commands()? || !self.supervised {
                return Ok(());
            }
        }
        let supervisor = self.channel.as_fd().as_raw_fd();
        self.event_loop.registry().register(
            &mut SourceFd(&supervisor),
            SUPERVISOR,
            Interest::READABLE,
        )?;
        let mut checked = Instant::now();
        loop {
            // Without a supervisor nobody else would tell that the guest is gone, nor may a device that is leaving.
            let looks = !self.supervised || !self.leaving.is_empty();
            let timeout = looks.then_some(ORPHAN_CHECK);
            self.event_loop.serve(timeout)?;
            self.see_off();
            if !self.supervised && checked.elapsed() >= ORPHAN_CHECK {
                if !self.event_loop.hypervisor().is_alive() {
                    return Ok(());
                }
                checked = Instant::now();
            }
            if self.supervised && self.event_loop.is_ready(SUPERVISOR) {
                if self.handle_commands()? {
                    return Ok(());
                }
                if !self.supervised {
                    self.event_loop
                        .registry()
                        .deregister(&mut SourceFd(&supervisor))?;
                }
            }
        }
    }

    /// Does what the supervisor asks. True when it asks to stop.
    fn handle_commands(&mut self) -> Result<bool> {
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
                    bytes,
                    shared,
                    serial,
                    served,
                    lock,
                    state_bytes,
                } => {
                    self.state.grow(state_bytes);
                    let mode = if grant_usage {
                        AddressMode::Grants
                    } else {
                        AddressMode::Frames
                    };
                    let device = NewDevice {
                        key,
                        range: MmioRange { base, len },
                        irq,
                        mode,
                        served,
                    };
                    let disk = NewDisk {
                        read_only,
                        bytes,
                        shared,
                        serial,
                        lock,
                    };
                    match self.attach_disk(&device, &disk, fds) {
                        Ok(slot) => {
                            let before = self.slots.insert(key, slot);
                            // Missing at another address, where it will not come back.
                            if let Some(before) = before.filter(|before| *before != slot) {
                                drop(self.event_loop.remove(before));
                            }
                            FromWorker::Attached { key }
                        }
                        Err(error) => FromWorker::AttachFailed {
                            key,
                            busy: error.is::<NoRing>()
                                || error.downcast_ref().is_some_and(LockError::is_busy),
                            error: format!("{error:#}"),
                        },
                    }
                }
                ToWorker::Serve => {
                    self.keep_missing()?;
                    self.begun = true;
                    FromWorker::Serving
                }
                ToWorker::Detach { key } => {
                    self.state.forget(key)?;
                    self.told.remove(&key);
                    let slot = self.slots.remove(&key);
                    match slot.and_then(|slot| self.event_loop.remove(slot)) {
                        Some(device) => {
                            self.leaving.push((key, device));
                            self.see_off();
                            continue;
                        }
                        None => FromWorker::Detached { key },
                    }
                }
                ToWorker::Report => FromWorker::Report {
                    server: self.event_loop.report(),
                    devices: self
                        .slots
                        .iter()
                        .filter_map(|(key, slot)| Some((*key, self.event_loop.device(*slot)?)))
                        .collect(),
                },
                ToWorker::Resize { key, bytes } => {
                    self.resize(key, bytes);
                    continue;
                }
                ToWorker::Stop => return Ok(true),
            };
            if self.channel.send(&answer, &[]).is_err() {
                self.lose_supervisor();
                return Ok(false);
            }
        }
    }

    /// Tells the supervisor which devices have left.
    fn see_off(&mut self) {
        let mut left = Vec::new();
        let event_loop = &mut self.event_loop;
        self.leaving.retain_mut(|(key, device)| {
            let has_left = event_loop.has_left(&mut **device);
            if has_left {
                left.push(*key);
            }
            !has_left
        });
        for key in left {
            if self.supervised
                && self
                    .channel
                    .send(&FromWorker::Detached { key }, &[])
                    .is_err()
            {
                self.lose_supervisor();
            }
        }
    }

    /// Keeps the places of those devices that the guest knows and that could not be handed over. One that
    /// cannot be kept is no reason not to serve the others.
    fn keep_missing(&mut self) -> Result<()> {
        let mut lost = Vec::new();
        for (key, range, state) in self.state.devices()? {
            if !self.slots.contains_key(&key) {
                match self.event_loop.add_missing(range, state) {
                    Ok(slot) => drop(self.slots.insert(key, slot)),
                    Err(error) => lost.push(format!("{key}: {error}")),
                }
            }
        }
        if let Some(first) = lost.first() {
            tracing::error!("devices that are given up: {}; {first}", lost.len());
        }
        Ok(())
    }

    fn lose_supervisor(&mut self) {
        // If it is still there, it finds out, and has another worker take over.
        self.channel.shut_down();
        tracing::warn!("the supervisor is gone; the guest is served on as it is");
        self.supervised = false;
    }

    fn attach_disk(
        &mut self,
        new: &NewDevice,
        new_disk: &NewDisk,
        fds: Vec<OwnedFd>,
    ) -> Result<Slot> {
        let file = fds
            .into_iter()
            .next()
            .context("no descriptor came with the disk")?;
        if self.rings.is_empty() && !self.leaving.is_empty() {
            return Err(NoRing.into());
        }
        let mut claim: Option<Claim> = None;
        let taken = if new_disk.read_only {
            Ok(())
        } else {
            disk_lock::take(&file, new_disk.lock)
        };
        match taken {
            Ok(()) => new_disk.take_image(&file, new)?,
            // What the guest has had is served, and waits; all else can be refused.
            Err(LockError::Busy) if new.served && !self.begun => {
                let (file, new, new_disk) = (file.try_clone()?, new.clone(), new_disk.clone());
                claim = Some(Box::new(move || {
                    disk_lock::take(&file, new_disk.lock)?;
                    Ok(new_disk.take_image(&file, &new)?)
                }));
            }
            Err(error) => return Err(error.into()),
        }
        let mut disk = Disk::from_file(file.into(), new_disk.read_only)?;
        let backing = Backing::of(disk.file())?;
        let name = Name {
            key: new.key,
            base: new.range.base,
            backing: Some(backing),
            device_type: DeviceType::BLOCK.0,
        };
        let records = self.state.device(&name, new.served)?;
        let (kept, told) = (records.own(0, Blk::KEPT)?, records.own(1, SHOWN)?);
        // The driver may have been told of another size, which it is to keep until it is told of this one.
        let shown = match told.load(0) {
            0 => new_disk.bytes,
            shown => shown,
        };
        disk.set_bytes(shown);
        let hypervisor = self.event_loop.hypervisor();
        let queues = u16::try_from(hypervisor.vcpus().min(MAX_DISK_QUEUES))?;
        let mut blk = Blk::new(disk, padded(&new_disk.serial), queues, kept, &self.rings)?;
        if let Some(claim) = claim {
            blk.claim_first(claim);
        }
        let access = hypervisor.guest_access(new.mode);
        let line = hypervisor.interrupt_line(new.irq);
        let state = records.device_state(blk.queue_sizes())?;
        let mut device = MmioDevice::new(Box::new(blk), new.mode, access, line, state)?;
        if shown != new_disk.bytes {
            device.resize(new_disk.bytes);
        }
        // Last: a worker that dies before this has the next one tell the driver once more.
        told.store(0, new_disk.bytes);
        self.told.insert(new.key, told);
        Ok(self.event_loop.add(new.range, device)?)
    }

    fn resize(&mut self, key: EntryKey, bytes: u64) {
        if let Some(slot) = self.slots.get(&key)
            && self.event_loop.resize(*slot, bytes)
            && let Some(told) = self.told.get(&key)
        {
            told.store(0, bytes);
        }
    }
}

/// Without a ring a disk would hold up all of its guest.
#[derive(Debug, thiserror::Error)]
#[error("no io_uring is left for it while a disk that was detached hangs")]
struct NoRing;

/// What the supervisor says of any device.
#[derive(Clone)]
struct NewDevice {
    key: EntryKey,
    range: MmioRange,
    irq: u32,
    mode: AddressMode,
    served: bool,
}

/// What it says of a disk besides.
#[derive(Clone)]
struct NewDisk {
    read_only: bool,
    bytes: u64,
    shared: bool,
    serial: String,
    lock: u64,
}

impl NewDisk {
    /// Tells other programs that the image is in use.
    fn take_image(&self, file: &OwnedFd, device: &NewDevice) -> Result<(), LockError> {
        if self.shared {
            return Ok(());
        }
        let taken = disk_lock::take_image(file, !self.read_only);
        if let Err(error) = &taken
            && device.served
        {
            // What the guest has had it keeps: it may be that the other program came meanwhile.
            tracing::warn!("{}: {error}", device.key);
            return Ok(());
        }
        taken
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
