//! The worker: one process for one guest, which does all that guest-written memory has a say in.

mod budget;
mod contention;
pub mod event_loop;
pub mod polling;
mod priority;
pub mod sandbox;
// System calls that no library has.
#[allow(unsafe_code)]
mod slice;
mod trace_pipe;

use crate::devices::{self, Arriving, Building, Built, Control, NewDevice, Resources};
use crate::guest_state::{GuestState, Name};
use crate::ipc::{Attachment, FromWorker, ToWorker, WorkerEnd, WorkerEnds};
use crate::toolstack::libxl::{EntryKey, MAX_DEVICES};
use crate::worker::event_loop::EventLoop;
use crate::worker::trace_pipe::TracePipe;
use anyhow::{Context, Result, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};
use xen_virtio_backend::Device;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::TraceSink;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_guest_mapping::xen::{Domid, Privcmd};
use xen_virtio_transport::xen::{EventChannels, XenGuest};
use xen_virtio_transport::{MmioDevice, MmioRange, Slot};

const SUPERVISOR: Token = Token(0);
const ARRIVING: Token = Token(1);

/// How often a worker without a supervisor looks whether its guest still lives, and one with leaving devices at those.
const ORPHAN_CHECK: Duration = Duration::from_secs(1);

/// Serves the guest that the supervisor at the other side of `ends` names, until it is gone.
///
/// # Errors
///
/// What keeps the guest from being served; the supervisor is told too.
pub fn run(ends: WorkerEnds) -> Result<()> {
    let channel = Rc::new(WorkerEnd::new(ends));
    let (event_loop, state, rings) = match start(&channel) {
        Ok(Some(started)) => started,
        Ok(None) => return Ok(()),
        Err(error) => {
            // The supervisor logs it, with the guest's name.
            channel.send(&FromWorker::Failed {
                error: format!("{error:#}"),
            })?;
            return Ok(());
        }
    };
    let mut worker = Worker {
        channel,
        event_loop,
        state,
        rings,
        slots: BTreeMap::new(),
        controls: BTreeMap::new(),
        arriving: BTreeMap::new(),
        leaving: Vec::new(),
        known: BTreeMap::new(),
        begun: false,
        supervised: true,
    };
    if let Err(error) = worker.serve() {
        let error = format!("{error:#}");
        worker.channel.send(&FromWorker::Failed { error })?;
    }
    Ok(())
}

/// Takes what the supervisor hands over, and the guest from an earlier worker if there was one. `None` if
/// there is no supervisor any more.
fn start(channel: &WorkerEnd) -> Result<Option<(EventLoop<XenGuest>, GuestState, RingStock)>> {
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
    if let Err(error) = slice::shorten() {
        tracing::info!(
            "it has no short time slice ({error}): what else dom0 computes holds the guest up"
        );
    }
    if let Err(error) = priority::allow() {
        tracing::info!(
            "it may not raise its priority ({error}; LimitNICE=-5 in the service's unit): what else dom0 computes holds the guest up"
        );
    }
    let rings = crate::worker::sandbox::enter(domid, || RingStock::new(MAX_DEVICES))
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

fn wait_readable(channel: &WorkerEnd) -> io::Result<()> {
    let mut fds = [rustix::event::PollFd::new(
        channel,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None)?;
    Ok(())
}

struct Worker {
    event_loop: EventLoop<XenGuest>,
    channel: Rc<WorkerEnd>,
    state: GuestState,
    /// A ring for each device that the guest can have: none can be made in the sandbox.
    rings: RingStock,
    slots: BTreeMap<EntryKey, Slot>,
    /// What changes the devices that can be changed.
    controls: BTreeMap<EntryKey, Box<dyn Control>>,
    /// Devices that were attached, and of which it is not known yet what they are to be.
    arriving: BTreeMap<EntryKey, Arrival>,
    /// Devices that were detached, and of which transfers are under way.
    leaving: Vec<(EntryKey, Box<dyn Device>)>,
    /// What the supervisor is to be told of devices that were just added.
    known: BTreeMap<EntryKey, Value>,
    /// The guest may be answered: whatever device it knows is here.
    begun: bool,
    /// Whether the supervisor is still there. Without it the guest is served on as it is.
    supervised: bool,
}

/// A device that was attached, and waits for somebody to say what it is to be.
struct Arrival {
    new: Attachment,
    /// Nothing was recorded of it before.
    is_new: bool,
    device: Box<dyn Arriving>,
}

impl Worker {
    fn serve(&mut self) -> Result<()> {
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
            let due = self
                .arriving
                .values()
                .filter_map(|arrival| arrival.device.due());
            let due = due.map(|at| at.saturating_duration_since(Instant::now()));
            self.event_loop.serve(due.chain(timeout).min())?;
            self.see_off();
            self.welcome()?;
            self.share();
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
                ToWorker::Attach(new) => {
                    let key = new.key;
                    match self.attach(*new, fds) {
                        Ok(Some(slot)) => self.attached(key, Ok(slot)),
                        // It is answered when it is known what it is to be.
                        Ok(None) => continue,
                        Err(error) => self.attached(key, Err(error)),
                    }
                }
                ToWorker::Claim { key, base, len } => {
                    match self.event_loop.claim(MmioRange { base, len }) {
                        Ok(()) => FromWorker::Attached { key, known: None },
                        Err(error) => not_attached(key, &error.into()),
                    }
                }
                ToWorker::Serve => {
                    self.keep_missing()?;
                    self.begun = true;
                    FromWorker::Serving
                }
                ToWorker::Detach { key } => {
                    self.state.forget(key)?;
                    self.controls.remove(&key);
                    if let Some(Arrival { device, .. }) = self.arriving.remove(&key) {
                        self.end_arrival(&*device);
                        let withdrawn = Err(anyhow!("it was taken away before it was known"));
                        let answer = self.attached(key, withdrawn);
                        // If this is not taken, the next message is not either.
                        let _ = self.channel.send(&answer);
                    }
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
                ToWorker::Change { key, change } => {
                    if let Err(error) = self.change(key, &change, fds) {
                        tracing::error!(device = %key, "is not changed: {error:#}");
                    }
                    continue;
                }
                ToWorker::Trace { key, goes_on } => {
                    if let Some(pipe) = fds.into_iter().next() {
                        self.trace(key, goes_on, TracePipe::new(pipe));
                    }
                    continue;
                }
                ToWorker::Stop => return Ok(true),
            };
            if self.channel.send(&answer).is_err() {
                self.lose_supervisor();
                return Ok(false);
            }
        }
    }

    /// Tells the supervisor what the next worker is to go on from.
    fn share(&mut self) {
        for (key, control) in &self.controls {
            let Some(connection) = control.shared() else {
                continue;
            };
            let key = *key;
            // A supervisor that is gone has given it up.
            let _ = self.channel.send(&FromWorker::Shares { key, connection });
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
            if self.supervised && self.channel.send(&FromWorker::Detached { key }).is_err() {
                self.lose_supervisor();
            }
        }
    }

    /// Keeps the places of those devices that the guest knows and that could not be handed over. One that
    /// cannot be kept is no reason not to serve the others.
    fn keep_missing(&mut self) -> Result<()> {
        let mut lost = Vec::new();
        for (key, range, state) in self.state.devices()? {
            // What nobody has had yet has no place to keep.
            let arrives = self
                .arriving
                .get(&key)
                .is_some_and(|arrival| arrival.is_new);
            if !self.slots.contains_key(&key) && !arrives {
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

    /// The answer to a device's having been attached, or not.
    fn attached(&mut self, key: EntryKey, result: Result<Slot>) -> FromWorker {
        match result {
            Ok(slot) => {
                let before = self.slots.insert(key, slot);
                // Missing at another address, where it will not come back.
                if let Some(before) = before.filter(|before| *before != slot) {
                    drop(self.event_loop.remove(before));
                }
                let known = self.known.remove(&key);
                FromWorker::Attached { key, known }
            }
            Err(error) => not_attached(key, &error),
        }
    }

    /// Attaches a device: its slot, or nothing if it is not known yet what it is to be.
    fn attach(&mut self, new: Attachment, descriptors: Vec<OwnedFd>) -> Result<Option<Slot>> {
        self.state.grow(new.state_bytes);
        let records = self.state.device(&name_of(&new), new.served)?;
        let is_new = records.is_new();
        let resources = Resources {
            rings: &self.rings,
            vcpus: self.event_loop.hypervisor().vcpus(),
            begun: self.begun,
            has_leaving: !self.leaving.is_empty(),
            channel: Some(&self.channel),
        };
        let wanted = NewDevice {
            key: new.key,
            served: new.served,
            spec: new.spec.clone(),
            descriptors,
            records: &records,
        };
        let kind = devices::kind(new.device_type, new.service)?;
        let building = kind.build(wanted, &resources);
        match building {
            Ok(Building::Ready(built)) => {
                let added = self.add(&new, built);
                self.keep_record(&new, is_new, added).map(Some)
            }
            Ok(Building::Arriving(device)) => {
                let readable = device.readable().as_raw_fd();
                let registry = self.event_loop.registry();
                registry.register(&mut SourceFd(&readable), ARRIVING, Interest::READABLE)?;
                let key = new.key;
                let arrival = Arrival {
                    new,
                    is_new,
                    device,
                };
                if let Some(before) = self.arriving.insert(key, arrival) {
                    self.end_arrival(&*before.device);
                }
                Ok(None)
            }
            Err(error) => self.keep_record(&new, is_new, Err(error)),
        }
    }

    /// Nobody has driven a new device that could not be attached. One that was recorded may be in use, whatever the supervisor
    /// knows of that: the worker before may have died before it could tell.
    fn keep_record<T>(&self, new: &Attachment, is_new: bool, result: Result<T>) -> Result<T> {
        if result.is_err() && is_new {
            self.state.forget(new.key)?;
        }
        result
    }

    fn end_arrival(&self, device: &dyn Arriving) {
        // Whoever has the other end of what it waits for is told nothing.
        let registry = self.event_loop.registry();
        let _ = registry.deregister(&mut SourceFd(&device.readable().as_raw_fd()));
    }

    /// Takes in the devices of which it is known now what they are to be.
    fn welcome(&mut self) -> Result<()> {
        let mut known = Vec::new();
        for (key, arrival) in &mut self.arriving {
            match arrival.device.step() {
                Ok(false) => {}
                Ok(true) => known.push((*key, Ok(()))),
                Err(error) => known.push((*key, Err(error))),
            }
        }
        for (key, result) in known {
            let Some(arrival) = self.arriving.remove(&key) else {
                continue;
            };
            self.end_arrival(&*arrival.device);
            let Arrival {
                new,
                is_new,
                device,
            } = arrival;
            let finished = result.and_then(|()| {
                let records = self.state.device(&name_of(&new), true)?;
                device.finish(&records)
            });
            let added = finished.and_then(|built| self.add(&new, built));
            let added = self.keep_record(&new, is_new, added);
            let answer = self.attached(key, added);
            if self.supervised && self.channel.send(&answer).is_err() {
                self.lose_supervisor();
            }
        }
        Ok(())
    }

    /// Adds a device that was built to the guest's.
    fn add(&mut self, new: &Attachment, built: Built) -> Result<Slot> {
        let Built {
            device,
            control,
            known,
        } = built;
        let mode = if new.grant_usage {
            AddressMode::Grants
        } else {
            AddressMode::Frames
        };
        let records = self.state.device(&name_of(new), true)?;
        let state = records.device_state(&device.identity().queue_sizes)?;
        let hypervisor = self.event_loop.hypervisor();
        let mut device = MmioDevice::new(device, hypervisor, mode, new.irq, state)?;
        // The driver may have been told otherwise by an earlier worker.
        device.update();
        let range = MmioRange {
            base: new.base,
            len: new.len,
        };
        let slot = self.event_loop.add(range, device)?;
        if let Some(known) = known {
            self.known.insert(new.key, known);
        }
        if let Some(control) = control {
            // Last: a worker that dies before this has the next one tell the driver once more.
            control.told();
            self.controls.insert(new.key, control);
        }
        Ok(slot)
    }

    /// Has `pipe` told of each request of a device. One that goes on after another worker takes nobody's place.
    fn trace(&self, key: EntryKey, goes_on: bool, mut pipe: TracePipe) {
        let slot = self.slots.get(&key);
        let Some(trace) = slot.and_then(|slot| self.event_loop.trace(*slot)) else {
            return;
        };
        match goes_on && trace.is_on() {
            true => pipe.replaced(),
            false => trace.begin(Box::new(pipe)),
        }
    }

    fn change(&mut self, key: EntryKey, change: &Value, descriptors: Vec<OwnedFd>) -> Result<()> {
        if let Some(control) = self.controls.get(&key)
            && let Some(slot) = self.slots.get(&key)
        {
            control.change(change, descriptors)?;
            if self.event_loop.update(*slot) {
                control.told();
            }
        }
        Ok(())
    }
}

fn not_attached(key: EntryKey, error: &anyhow::Error) -> FromWorker {
    FromWorker::AttachFailed {
        key,
        busy: devices::is_busy(error),
        error: format!("{error:#}"),
    }
}

fn name_of(new: &Attachment) -> Name {
    Name {
        key: new.key,
        base: new.base,
        backing: new.backing,
        device_type: new.device_type,
    }
}
