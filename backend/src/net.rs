//! The network device (virtio 1.3, 5.1), on an interface of dom0's.

mod command;
mod controls;
mod counters;
mod filter;
mod frame;
mod interface;
mod interrupts;
mod offloads;
mod receive;
mod send;

pub use interface::{Interface, Tap};

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Limiter, Limits, Scratch};
use crate::persist::StateCell;
use crate::shortage::Shortage;
use crate::tuning::{SENT_BYTES, SIMPLE_BATCH, STEPS_PER_FRAME_LOOK};
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use command::Command;
use controls::Controls;
use counters::Counters;
use interrupts::{Interrupts, Moderation};
use offloads::{Offloads, SEGMENTED_UDP};
use receive::{Receiver, Wishes};
use send::{Sender, Wire};
use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as ids;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// Pairs of queues that one device may have.
pub const MAX_PAIRS: u16 = 8;

/// What a network device is to be.
#[derive(Clone, Debug)]
pub struct Setup {
    pub mac: [u8; 6],
    /// The largest packet, if the driver is to be told of it.
    pub mtu: Option<u16>,
    /// The interface segments UDP, and takes it unsegmented.
    pub segments_udp: bool,
    /// For what the guest sends, and for what it receives.
    pub sends: Limits,
    pub receives: Limits,
}

/// A network interface for a guest.
pub struct Net {
    identity: Identity,
    setup: Setup,
    queues: QueueSet,
    /// What the driver has accepted, once one of its queues has begun.
    features: u64,
    controls: Controls,
    /// The controls, for a later process.
    kept: StateCell,
    link: Link,
    pairs: Vec<Pair>,
    control: Scratch,
    /// A command that waits for dom0's memory.
    held: Option<Request>,
    /// Of each queue but the control queue.
    interrupts: Vec<Interrupts>,
    sends: Limiter,
    receives: Limiter,
    /// Steps since the interfaces were looked at.
    unlooked: u32,
    counters: Counters,
    shortage: Shortage,
}

/// A receiving and a sending queue, with the queue of the interface that they share.
struct Pair {
    receiver: Receiver,
    sender: Sender,
    interface: Box<dyn Interface>,
    /// Whether frames come by it, once that has been said.
    is_used: Option<bool>,
}

/// Whether the cable is plugged in: changed from outside, and taken up by the device's next [`Device::update`]. A clone is of
/// the same device.
#[derive(Clone, Debug)]
pub struct Link(Rc<Cell<bool>>);

impl Link {
    pub fn set_up(&self, is_up: bool) {
        self.0.set(is_up);
    }
}

/// What a queue is for (virtio 1.3, 5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receives(usize),
    Sends(usize),
    Controls,
    Nothing,
}

/// What a device offers whatever it is set up as.
const OFFERED: u64 = 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << ids::VIRTIO_NET_F_CSUM
    | 1 << ids::VIRTIO_NET_F_HOST_TSO4
    | 1 << ids::VIRTIO_NET_F_HOST_TSO6
    | 1 << ids::VIRTIO_NET_F_HOST_ECN
    | offloads::ALL & !SEGMENTED_UDP
    | 1 << ids::VIRTIO_NET_F_MAC
    | 1 << ids::VIRTIO_NET_F_MRG_RXBUF
    | 1 << ids::VIRTIO_NET_F_STATUS
    | 1 << ids::VIRTIO_NET_F_CTRL_VQ
    | 1 << ids::VIRTIO_NET_F_CTRL_RX
    | 1 << ids::VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << ids::VIRTIO_NET_F_CTRL_VLAN
    | 1 << ids::VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << ids::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << ids::VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << ids::VIRTIO_NET_F_NOTF_COAL
    | 1 << ids::VIRTIO_NET_F_VQ_NOTF_COAL;

/// What was moved by a queue at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Moved {
    /// The driver's requests that are done.
    requests: u32,
    bytes: usize,
}

impl Moved {
    /// For how many frames it counts where the driver waits to hear of frames: one that sends much waits for its memory.
    fn weight(self) -> u32 {
        let large = u32::try_from(self.bytes / SENT_BYTES).unwrap_or(u32::MAX);
        self.requests.max(large)
    }
}

/// Why frames were not moved.
#[derive(Debug)]
enum TransferError {
    Device(DeviceError),
    /// dom0 lacks something; they are moved by a later call.
    Dom0(CopyFault),
}

impl From<DeviceError> for TransferError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl Net {
    pub const DEVICE_TYPE: DeviceType = DeviceType(VIRTIO_ID_NET);

    /// The largest size of each queue that carries frames, and of the control queue.
    pub const QUEUE_SIZE: u16 = 512;
    pub const CONTROL_QUEUE_SIZE: u16 = 64;

    /// The sizes of the queues of a device with `pairs` pairs of them.
    pub fn queue_sizes(pairs: u16) -> Vec<u16> {
        let mut sizes = vec![Self::QUEUE_SIZE; 2 * usize::from(pairs)];
        sizes.push(Self::CONTROL_QUEUE_SIZE);
        sizes
    }

    /// Bytes of the cell that such a device keeps beyond its process.
    pub const fn kept_bytes(pairs: u16) -> usize {
        StateCell::bytes(Controls::bytes(pairs))
    }

    /// A device on `interfaces`, the queues of one interface, of which there are one to [`MAX_PAIRS`]. `kept` (a cell in
    /// [`Net::kept_bytes`]) remembers what the driver has set. With `is_up`, the cable is plugged in.
    ///
    /// # Errors
    ///
    /// If the system has not the memory, or `kept` is no such cell.
    pub fn new(
        setup: Setup,
        interfaces: Vec<Box<dyn Interface>>,
        kept: StateCell,
        is_up: bool,
    ) -> io::Result<Self> {
        let pairs = u16::try_from(interfaces.len()).unwrap_or(MAX_PAIRS);
        let mut features = OFFERED;
        if setup.segments_udp {
            features |= SEGMENTED_UDP | 1 << ids::VIRTIO_NET_F_HOST_USO;
        }
        if setup.mtu.is_some() {
            features |= 1 << ids::VIRTIO_NET_F_MTU;
        }
        if pairs > 1 {
            features |= 1 << ids::VIRTIO_NET_F_MQ;
        }
        let bytes = kept.load().map_err(io::Error::other)?;
        let controls = match bytes.is_empty() {
            true => Controls::new(setup.mac, pairs, is_up),
            false => Controls::read(&bytes, pairs).ok_or_else(|| {
                io::Error::other("what is kept of the device's controls is damaged")
            })?,
        };
        let queue_sizes = Self::queue_sizes(pairs);
        let pair = |interface| {
            io::Result::Ok(Pair {
                receiver: Receiver::new()?,
                sender: Sender::new()?,
                interface,
                is_used: None,
            })
        };
        Ok(Self {
            queues: QueueSet::new(queue_sizes.len()),
            interrupts: (1..queue_sizes.len())
                .map(|_| Interrupts::default())
                .collect(),
            identity: Identity {
                device_type: Self::DEVICE_TYPE,
                features,
                queue_sizes,
            },
            features: 0,
            controls,
            kept,
            link: Link(Rc::new(Cell::new(is_up))),
            pairs: interfaces.into_iter().map(pair).collect::<Result<_, _>>()?,
            control: Scratch::new()?,
            held: None,
            sends: Limiter::new(setup.sends),
            receives: Limiter::new(setup.receives),
            unlooked: 0,
            counters: Counters::default(),
            shortage: Shortage::default(),
            setup,
        })
    }

    /// What plugs the cable in and out from now on.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    fn has_feature(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// The control queue comes behind those that the driver knows of: without MQ, behind the first pair (virtio 1.3, 5.1.2).
    fn role(&self, queue: usize) -> Role {
        let known = match self.has_feature(ids::VIRTIO_NET_F_MQ) {
            true => self.pairs.len(),
            false => 1,
        };
        let pair = queue / 2;
        match queue % 2 {
            0 if queue == 2 * known => Role::Controls,
            _ if pair >= known => Role::Nothing,
            0 => Role::Receives(pair),
            _ => Role::Sends(pair),
        }
    }

    fn offloads(&self) -> Offloads {
        let accepted = Offloads::accepted(self.features);
        self.controls.offloads.unwrap_or(accepted)
    }

    /// Tells the interface what the driver has set.
    fn apply_controls(&mut self) {
        let offloads = self.offloads();
        let used = usize::from(self.controls.pairs);
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            // One that cannot be told hands over what the driver does not take, which is dropped.
            let mut result = pair.interface.set_offloads(offloads.bits());
            let is_used = index < used;
            if pair.is_used.replace(is_used) != Some(is_used) {
                result = result.and(pair.interface.set_used(is_used));
            }
            pair.receiver.look();
            if let Err(error) = result {
                self.counters.interface = Some(error.to_string());
            }
        }
    }

    /// Carries out what is in the control queue. True if there was anything.
    fn control(&mut self, access: &mut dyn GuestAccess) -> Result<bool, DeviceError> {
        let index = (0..self.queues.count()).find(|index| self.role(*index) == Role::Controls);
        let Some(index) = index else { return Ok(false) };
        for done in 0..SIMPLE_BATCH {
            let Some(queue) = self.queues.get(index) else {
                return Ok(done > 0);
            };
            let request = match self.held.take() {
                Some(held) => Some(held),
                None => queue.pop()?,
            };
            let Some(request) = request else {
                return Ok(done > 0);
            };
            match self.carry_out(&request, access) {
                Ok(written) => {
                    let queue = self.queues.get(index).expect("it was there");
                    queue.complete(request.finish(written))?;
                }
                Err(fault) => {
                    self.held = Some(request);
                    self.lacks(fault);
                    return Ok(done > 0);
                }
            }
        }
        Ok(true)
    }

    /// Carries out a command. How many bytes of its answer were written.
    ///
    /// # Errors
    ///
    /// A fault that is dom0's: nothing has come of the command.
    fn carry_out(
        &mut self,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, CopyFault> {
        let command = match self.control.read(&request.readable, access) {
            Ok(bytes) => Command::read(bytes, self.features),
            Err(fault) if fault.is_dom0s() => return Err(fault),
            Err(_) => None,
        };
        let mut controls = self.controls.clone();
        let applied = command.map(|command| controls.apply(command));
        let answer = match applied {
            Some(Ok(answer)) => {
                if controls != self.controls {
                    self.controls = controls;
                    self.keep_controls();
                    self.apply_controls();
                }
                let mut bytes = vec![low(ids::VIRTIO_NET_OK)];
                bytes.extend(answer.into_iter().flat_map(|of| of.bytes()));
                bytes
            }
            Some(Err(_)) | None => {
                self.counters.refused_commands += 1;
                vec![low(ids::VIRTIO_NET_ERR)]
            }
        };
        self.counters.commands += 1;
        match self.control.write(&answer, &request.writable, access) {
            Err(fault) if fault.is_dom0s() => Err(fault),
            // A driver that takes no answer gets none.
            written => Ok(written.unwrap_or(0)),
        }
    }

    fn keep_controls(&self) {
        let kept = self.kept.store(&self.controls.write());
        kept.expect("a cell with room for what controls can be");
    }

    fn lacks(&mut self, fault: CopyFault) {
        self.shortage.note("copying frames", &fault, Instant::now());
    }

    /// Moves frames, both ways, and shows the driver those that it has. True if it is to be interrupted.
    fn transfer(&mut self, access: &mut dyn GuestAccess) -> Result<(bool, Activity), DeviceError> {
        if self.unlooked.is_multiple_of(STEPS_PER_FRAME_LOOK) {
            for pair in &mut self.pairs {
                pair.receiver.look();
            }
        }
        self.unlooked = self.unlooked.wrapping_add(1);
        let (mut interrupt, mut activity) = (false, Activity::Idle);
        for index in 0..self.queues.count() {
            match self.serve(index, access) {
                Ok(Moved { requests: 0, .. }) => {}
                Ok(moved) => {
                    let queue = self.queues.get(index).expect("it was served");
                    let is_wanted = queue.publish()?;
                    let asked = self.controls.moderation[index];
                    let (shown, rule) = match self.role(index) {
                        Role::Sends(_) if asked.is_none() => (moved.weight(), Moderation::SENT),
                        _ => (moved.requests, asked),
                    };
                    interrupt |= self.interrupts[index].shown(shown, is_wanted, rule);
                    activity = Activity::Working;
                    self.unlooked = 0;
                    self.shortage.end();
                }
                Err(TransferError::Dom0(fault)) => self.lacks(fault),
                Err(TransferError::Device(error)) => return Err(error),
            }
        }
        if self.pairs.iter().any(|pair| pair.receiver.has_more()) {
            activity = Activity::Working;
        }
        Ok((interrupt, activity))
    }

    /// Moves frames by one queue.
    fn serve(
        &mut self,
        index: usize,
        access: &mut dyn GuestAccess,
    ) -> Result<Moved, TransferError> {
        let role = self.role(index);
        let wishes = Wishes {
            filter: &self.controls.filter,
            offloads: self.offloads(),
            is_up: self.controls.is_up,
        };
        let Some(queue) = self.queues.get(index) else {
            return Ok(Moved::default());
        };
        let counters = &mut self.counters;
        match role {
            Role::Receives(pair) => {
                let pair = &mut self.pairs[pair];
                let interface = &mut *pair.interface;
                let limiter = &mut self.receives;
                match pair.is_used {
                    Some(true) => pair
                        .receiver
                        .step(queue, interface, &wishes, limiter, counters, access),
                    Some(false) | None => Ok(Moved::default()),
                }
            }
            Role::Sends(pair) => {
                let pair = &mut self.pairs[pair];
                let interface: &mut dyn Interface = &mut *pair.interface;
                let wire = Wire {
                    interface: wishes.is_up.then_some(interface),
                    features: self.features,
                };
                let limiter = &mut self.sends;
                pair.sender.step(queue, wire, limiter, counters, access)
            }
            Role::Controls | Role::Nothing => Ok(Moved::default()),
        }
    }
}

impl Device for Net {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        // struct virtio_net_config, up to `mtu` (virtio 1.3, 5.1.4).
        let flag = |flag: u32, is_set: bool| if is_set { flag } else { 0 };
        let status = flag(ids::VIRTIO_NET_S_LINK_UP, self.controls.is_up)
            | flag(ids::VIRTIO_NET_S_ANNOUNCE, self.controls.announce);
        let pairs = u16::try_from(self.pairs.len()).expect("few pairs");
        let mut space = self.controls.filter.mac.to_vec();
        space.extend([low(status), 0]);
        space.extend(pairs.to_le_bytes());
        space.extend(self.setup.mtu.unwrap_or(0).to_le_bytes());
        read_space(&space, offset, to);
    }

    fn update(&mut self) -> bool {
        let is_up = self.link.0.get();
        if is_up == self.controls.is_up {
            return false;
        }
        self.controls.is_up = is_up;
        // What is at the other end of the cable may have changed (5.1.4.1).
        self.controls.announce = is_up && self.has_feature(ids::VIRTIO_NET_F_GUEST_ANNOUNCE);
        self.keep_controls();
        true
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        if self.features != start.features {
            self.features = start.features;
            self.apply_controls();
        }
        // A buffer that is empty still, a frame that is sent twice, a command that is carried out again.
        self.queues.start(index, start, Unfinished::Repeat, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step {
            interrupt: self.interrupts.iter().any(Interrupts::is_due),
            ..Step::default()
        };
        if !self.shortage.holds() {
            if self.control(access)? {
                step.interrupt |= self.queues.publish()?;
                step.activity = Activity::Working;
            }
            let (interrupt, activity) = self.transfer(access)?;
            step.interrupt |= interrupt;
            step.activity = step.activity.max(activity);
        }
        if step.interrupt {
            self.interrupts.iter_mut().for_each(Interrupts::raised);
        }
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        // The event that woke us may have been that of a frame, which is told of once.
        self.unlooked = 0;
        let step = self.step(access)?;
        let mut more = false;
        if !self.shortage.holds() {
            let limited = self.sends.next().is_some();
            for index in 0..self.queues.count() {
                let role = self.role(index);
                let Some(queue) = self.queues.get(index) else {
                    continue;
                };
                more |= match role {
                    // A kick would tell of what is not to be sent yet.
                    Role::Sends(_) if limited => false,
                    Role::Sends(_) | Role::Controls => {
                        queue.resume_kicks()? || queue.available()? > 0
                    }
                    // Buffers are no news unless a frame waits for them.
                    Role::Receives(pair) if self.pairs[pair].receiver.is_starved() => {
                        queue.resume_kicks()?
                    }
                    Role::Receives(_) | Role::Nothing => false,
                };
            }
        }
        Ok(Step {
            activity: match more {
                true => Activity::Working,
                false => step.activity,
            },
            ..step
        })
    }

    fn try_again_at(&self) -> Option<Instant> {
        let interrupts = self.interrupts.iter().map(Interrupts::due_at);
        let waits = [
            self.shortage.try_at(),
            self.sends.next(),
            self.receives.next(),
        ];
        waits.into_iter().chain(interrupts).flatten().min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        for pair in &self.pairs {
            add(pair.interface.readable(), Interest::Readable);
        }
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        match self.role(index.get()) {
            Role::Receives(pair) => self.pairs[pair].receiver.forget(),
            Role::Sends(pair) => self.pairs[pair].sender.forget(),
            Role::Controls => self.held = None,
            Role::Nothing => {}
        }
        if let Some(interrupts) = self.interrupts.get_mut(index.get()) {
            *interrupts = Interrupts::default();
        }
        let busy = |pair: &Pair| pair.receiver.is_busy() || pair.sender.is_busy();
        if self.held.is_none() && !self.pairs.iter().any(busy) {
            self.shortage.forget();
        }
    }

    fn reset(&mut self) {
        let pairs = u16::try_from(self.pairs.len()).expect("few pairs");
        self.features = 0;
        self.controls = Controls::new(self.setup.mac, pairs, self.controls.is_up);
        self.keep_controls();
        for pair in &mut self.pairs {
            if pair.is_used.replace(false) != Some(false) {
                // The frames that come all the same are drained by the next reset.
                let _ = pair.interface.set_used(false);
            }
            receive::drain(&mut *pair.interface);
        }
    }

    fn warning(&self) -> Option<String> {
        let lack = self.shortage.warning();
        lack.or_else(|| {
            let error = self.counters.interface.as_ref()?;
            Some(format!(
                "its interface in dom0 cannot be used ({error}): is it there, and up?"
            ))
        })
    }

    fn counters(&self) -> RequestCounters {
        let (done, failed) = self.counters.requests();
        RequestCounters { done, failed }
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        self.counters.list(add);
    }
}

const fn low(value: u32) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}
