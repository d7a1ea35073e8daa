//! A device whose requests are answered by a back-end on shadow queues: the echo, as a process of its own would serve it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use xen_virtio_backend::shadow::{Loss, Region, Relay, RelayError, Rules, ShadowRecord};
use xen_virtio_backend::{
    Activity, Device, DeviceError, DeviceType, Identity, QueueError, QueueIndex, QueueSet,
    QueueStart, RequestCounters, Step, Unfinished,
};
use xen_virtio_guest_mapping::GuestAccess;

const RULES: Rules = Rules {
    loss: &[Loss::Repeat],
    overstate: false,
    alike: true,
};

const SIZE: u16 = 64;
const SIZES: [u16; 2] = [SIZE; 2];
/// Bytes of the pool: 16 pages, of which each queue has four of its own, and both share eight.
const POOL: usize = 64 << 10;
/// What the back-end knows the region's first byte by.
const BASE: u64 = 1 << 32;

/// To a request that begins with it, the back-end writes it into its last buffer, and says that it has written nothing.
pub const SAYS_NOTHING: u8 = 0xee;

/// The lengths of a request's descriptors, and whether they are writable.
pub type Framing = Vec<(u32, bool)>;

/// See the module. Requests of the first queue are echoed; those of the second stay with the back-end for ever.
pub struct ShadowEcho {
    identity: Identity,
    queues: QueueSet,
    relay: Relay,
    back_end: Option<BackEnd>,
    kicked: bool,
    is_started: bool,
    /// Of requests in the order in which they came.
    framings: Arc<Mutex<Vec<Framing>>>,
    /// The back-end dies at every so many kicks, and is followed by another one.
    dies_every: Option<u32>,
    kicks: u32,
}

/// Echoes what it is offered, as soon as it is kicked.
struct BackEnd {
    memory: GuestMemoryMmap,
    queue: Queue,
}

impl BackEnd {
    fn new(region: &Region) -> io::Result<Self> {
        let file = FileOffset::new(region.file().try_clone()?, 0);
        let range = (GuestAddress(BASE), region.bytes(), Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)?;
        let places = &region.rings()[0];
        let mut queue = Queue::new(SIZE).expect("a queue size");
        queue.set_size(places.size);
        let address = |place: usize| GuestAddress(BASE + place as u64);
        queue
            .try_set_desc_table_address(address(places.descriptors))
            .expect("aligned");
        queue
            .try_set_avail_ring_address(address(places.available))
            .expect("aligned");
        queue
            .try_set_used_ring_address(address(places.used))
            .expect("aligned");
        queue.set_event_idx(true);
        queue.set_ready(true);
        Ok(Self { memory, queue })
    }

    fn serve(&mut self, framings: &Mutex<Vec<Framing>>) {
        loop {
            self.queue
                .disable_notification(&self.memory)
                .expect("a ring");
            while let Some(chain) = self.queue.pop_descriptor_chain(&self.memory) {
                let head = chain.head_index();
                let framing = chain.clone();
                let framing = framing.map(|part| (part.len(), part.is_write_only()));
                framings
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(framing.collect());
                let mut bytes = Vec::new();
                for descriptor in chain.clone().readable() {
                    let mut part = vec![0; descriptor.len() as usize];
                    self.memory
                        .read_slice(&mut part, descriptor.addr())
                        .expect("in the region");
                    bytes.append(&mut part);
                }
                if bytes.first() == Some(&SAYS_NOTHING) {
                    let last = chain.writable().last().expect("a status");
                    self.memory
                        .write_obj(SAYS_NOTHING, last.addr())
                        .expect("in the region");
                    self.queue.add_used(&self.memory, head, 0).expect("a ring");
                    continue;
                }
                let mut left = &bytes[..];
                for descriptor in chain.writable() {
                    let (here, rest) = left.split_at(left.len().min(descriptor.len() as usize));
                    self.memory
                        .write_slice(here, descriptor.addr())
                        .expect("in the region");
                    left = rest;
                }
                let written = u32::try_from(bytes.len() - left.len()).expect("a short request");
                self.queue
                    .add_used(&self.memory, head, written)
                    .expect("a ring");
            }
            if !self
                .queue
                .enable_notification(&self.memory)
                .expect("a ring")
            {
                return;
            }
        }
    }
}

fn records() -> io::Result<Vec<ShadowRecord>> {
    SIZES.into_iter().map(ShadowRecord::private).collect()
}

impl ShadowEcho {
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            identity: Identity {
                device_type: DeviceType(0x3f),
                features: 1 << VIRTIO_RING_F_EVENT_IDX,
                queue_sizes: SIZES.into(),
            },
            queues: QueueSet::new(SIZES.len()),
            relay: Relay::new(&SIZES, POOL, BASE, RULES, records()?)?,
            back_end: None,
            kicked: false,
            is_started: false,
            framings: Arc::default(),
            dies_every: None,
            kicks: 0,
        })
    }

    /// One whose back-end dies at every `kicks` kicks, before it does anything of what it was kicked for.
    ///
    /// # Errors
    ///
    /// As [`ShadowEcho::new`].
    pub fn dying(kicks: u32) -> io::Result<Self> {
        Ok(Self {
            dies_every: Some(kicks),
            ..Self::new()?
        })
    }

    /// What its back-ends see.
    pub fn framings(&self) -> Arc<Mutex<Vec<Framing>>> {
        Arc::clone(&self.framings)
    }

    fn serve(&mut self) {
        self.kicks += 1;
        let dies = |every| self.kicks.is_multiple_of(every);
        let Some(back_end) = &mut self.back_end else {
            return;
        };
        if self.dies_every.is_none_or(|every| !dies(every)) {
            back_end.serve(&self.framings);
            return;
        }
        self.back_end = None;
        self.relay.lose();
    }
}

impl Device for ShadowEcho {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.queues
            .start(index, start, Unfinished::GiveBack, access)?;
        self.relay.start(index, true);
        if index.get() == 0 {
            self.is_started = true;
            self.back_end = Some(BackEnd::new(self.relay.region()).expect("descriptors"));
        }
        Ok(())
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        let out = self.relay.take_out(&mut self.queues, access, true);
        let out = out.map_err(|error| match error {
            RelayError::Device(error) => error,
            RelayError::Backend { .. } => panic!("{error}"),
        })?;
        // Another back-end is there at once, and begins when the guest has what the last one has used.
        let starts =
            self.is_started && self.back_end.is_none() && self.relay.resume(true).expect("memory");
        if starts {
            self.back_end = Some(BackEnd::new(self.relay.region()).expect("descriptors"));
        }
        let kicked = &mut self.kicked;
        let taken = self
            .relay
            .take_in(&mut self.queues, access, &mut |_| *kicked = true)?;
        let serves = std::mem::take(kicked);
        if serves {
            self.serve();
        }
        if out || taken || serves || starts {
            step.activity = Activity::Working;
        }
        step.interrupt = self.queues.publish()?;
        Ok(step)
    }

    fn prepare_sleep(&mut self, _access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        if self.relay.prepare_sleep(&mut self.queues)? {
            step.activity = Activity::Working;
        }
        Ok(step)
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        self.relay.stop(index);
        if index.get() == 0 {
            self.is_started = false;
            self.back_end = None;
        }
        self.relay.settle(index);
    }

    fn reset(&mut self) {}

    fn try_again_at(&self) -> Option<std::time::Instant> {
        self.relay.try_again_at()
    }

    fn counters(&self) -> RequestCounters {
        self.relay.counters()
    }
}
