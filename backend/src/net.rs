//! The network device (virtio 1.3, 5.1), on an interface of dom0's.

mod command;
mod control_queue;
mod controls;
mod counters;
mod filter;
mod frame;
mod interface;
mod interrupts;
mod offloads;
mod pair;
mod receive;
mod send;
mod transfer;

pub use interface::{Interface, Tap};

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Limiter, Limits, Scratch};
use crate::persist::StateCell;
use crate::shortage::Shortage;
use crate::tuning::SHORTEST_SLEEP;
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use controls::Controls;
use counters::Counters;
use frame::low;
use interrupts::Interrupts;
use offloads::{Offloads, SEGMENTED_UDP};
use pair::{Following, Pair};
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
    following: Following,
    /// The queue that is served first, so that none is always last.
    first: usize,
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
    /// What dom0 lacked in this step.
    lack: Option<CopyFault>,
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
            pairs: interfaces
                .into_iter()
                .map(Pair::new)
                .collect::<Result<_, _>>()?,
            following: Following::new(),
            first: 0,
            control: Scratch::new()?,
            held: None,
            sends: Limiter::new(setup.sends),
            receives: Limiter::new(setup.receives),
            unlooked: 0,
            counters: Counters::default(),
            shortage: Shortage::default(),
            lack: None,
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

    /// Whether a driver has waited long enough for an interrupt.
    fn is_interrupt_due(&self) -> bool {
        // No look at the clock where none waits.
        let mut queues = self.interrupts.iter();
        queues.any(|queue| queue.waits() && queue.is_due_by(Instant::now()))
    }

    fn offloads(&self) -> Offloads {
        let accepted = Offloads::accepted(self.features);
        self.controls.offloads.unwrap_or(accepted)
    }

    fn keep_controls(&self) {
        let kept = self.kept.store(&self.controls.write());
        kept.expect("a cell with room for what controls can be");
    }

    /// Has the interface follow what the driver has set.
    fn follow(&mut self) {
        let (offloads, used) = (self.offloads(), self.controls.pairs.into());
        if let Err(error) = self.following.follow(&mut self.pairs, offloads, used) {
            self.counters.interface = Some(error.to_string());
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
        self.features = start.features;
        // A buffer that is empty still, a frame that is sent twice, a command that is carried out again.
        self.queues.start(index, start, Unfinished::Repeat, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step {
            interrupt: self.is_interrupt_due(),
            ..Step::default()
        };
        if !self.shortage.holds() {
            self.lack = None;
            if self.control(access)? {
                step.interrupt |= self.queues.publish()?;
                step.activity = Activity::Working;
            }
            self.follow();
            let (interrupt, activity) = self.transfer(access)?;
            step.interrupt |= interrupt;
            step.activity = step.activity.max(activity);
            match &self.lack {
                Some(fault) => self.shortage.note("copying frames", fault, Instant::now()),
                None => self.shortage.end(),
            }
        }
        if step.interrupt {
            self.interrupts.iter_mut().for_each(Interrupts::raised);
        }
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        // The event that woke us may have been that of a frame, which is told of once.
        self.unlooked = 0;
        let mut step = self.step(access)?;
        // Nobody sleeps for less.
        let soon = Instant::now() + SHORTEST_SLEEP;
        if self.interrupts.iter().any(|queue| queue.is_due_by(soon)) {
            self.interrupts.iter_mut().for_each(Interrupts::raised);
            step.interrupt = true;
        }
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
            self.following.next(),
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
        if self.held.is_none() && !self.pairs.iter().any(Pair::is_busy) {
            self.shortage.forget();
        }
        // Who has nothing to send or to say waits for no time.
        self.following.rest();
        self.sends.forget();
        self.receives.forget();
    }

    fn reset(&mut self) {
        let pairs = u16::try_from(self.pairs.len()).expect("few pairs");
        self.features = 0;
        self.controls = Controls::new(self.setup.mac, pairs, self.controls.is_up);
        self.keep_controls();
        for pair in &mut self.pairs {
            pair.receiver.drain();
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
