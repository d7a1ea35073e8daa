//! The input device (virtio 1.3, 5.8): a keyboard, a pointer, a panel. Its events are those of a device of dom0's, or of whoever
//! injects them.

mod description;
// Makes the calls.
#[allow(unsafe_code)]
mod evdev;
mod event;
mod kept;

pub use description::{Axis, Description};
pub use evdev::Evdev;
pub use event::{Event, kind};

use crate::device::{
    Activity, Device, DeviceError, DeviceType, Identity, Interest, RequestCounters, Step,
    read_space,
};
use crate::engine::{Scratch, TransferError};
use crate::persist::StateCell;
use crate::shortage::Shortage;
use crate::tuning::{SIMPLE_BATCH, STEPS_PER_CLIENT_LOOK};
use crate::virtqueue::{QueueError, QueueIndex, QueueSet, QueueStart, Request, Unfinished};
use evdev::Looked;
use kept::Kept;
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Instant;
use virtio_bindings::virtio_ids::VIRTIO_ID_INPUT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::GuestAccess;

// virtio 1.3, 5.8.2.
const EVENTS: usize = 0;
const STATUS: usize = 1;

/// Where the answer to what a driver has selected begins in the configuration space, and where its length is (virtio 1.3, 5.8.4).
const ANSWER: usize = 8;
const ANSWER_LEN: usize = 2;

/// Events that wait for the guest at most, before what lets go of keys is not taken either.
const MOST_WAITING: usize = 2 * MAX_WAITING;

/// Reads of the source in a step.
const LOOKS: usize = 16;

/// Events that wait for the guest, but for those that were read, injected or made good at once.
const MAX_WAITING: usize = 1024;

/// An input device.
pub struct Input {
    identity: Identity,
    description: Description,
    queues: QueueSet,
    kept: Kept,
    /// Where its events come from, besides from whoever injects them.
    source: Option<Evdev>,
    is_gone: bool,
    injecting: Injecting,
    /// Events for the guest.
    waiting: VecDeque<Event>,
    /// Keys that are released by events that the guest sees with the next interrupt.
    released: Vec<u16>,
    /// What the source has is of before the driver.
    is_stale: bool,
    /// Linux has lost events: what it has still is not worth more than how things are now.
    is_dropping: bool,
    /// The source may have more than was taken at once.
    has_more: bool,
    /// Steps since the source was looked at.
    unlooked: u32,
    scratch: Scratch,
    /// A buffer that waits for dom0's memory.
    buffer: Option<Request>,
    shortage: Shortage,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    malformed: u64,
    events: u64,
    /// Events for which there was no room, and how often Linux has lost some.
    dropped: u64,
    losses: u64,
}

/// Injects events into a device, which takes them up by its next [`Device::update`]. A clone is of the same device.
#[derive(Clone, Debug, Default)]
pub struct Injecting(Rc<RefCell<Vec<Vec<Event>>>>);

impl Injecting {
    /// Has the guest see `events`, all of them or none. Those that the device cannot say are left out.
    pub fn inject(&self, events: Vec<Event>) {
        self.0.borrow_mut().push(events);
    }
}

impl Input {
    pub const DEVICE_TYPE: DeviceType = DeviceType(VIRTIO_ID_INPUT);

    /// The largest size of each of its queues.
    pub const QUEUE_SIZES: [u16; 2] = [64, 64];

    /// Bytes of the cell that it keeps beyond its process.
    pub const KEPT: usize = Kept::BYTES;

    /// The device of this description. With `served`, an earlier process had it, and `kept` is what that has left.
    ///
    /// # Errors
    ///
    /// The system's, or if `kept` is of another device.
    pub fn new(
        description: Description,
        source: Option<Evdev>,
        kept: StateCell,
        served: bool,
    ) -> io::Result<Self> {
        let mut this = Self {
            identity: Identity {
                device_type: Self::DEVICE_TYPE,
                features: 1 << VIRTIO_RING_F_EVENT_IDX,
                queue_sizes: Self::QUEUE_SIZES.to_vec(),
            },
            description,
            queues: QueueSet::new(Self::QUEUE_SIZES.len()),
            kept: Kept::new(kept)?,
            source,
            is_gone: false,
            injecting: Injecting::default(),
            waiting: VecDeque::new(),
            released: Vec::new(),
            is_stale: !served,
            is_dropping: false,
            has_more: false,
            unlooked: 0,
            scratch: Scratch::new()?,
            buffer: None,
            shortage: Shortage::default(),
            counters: Counters::default(),
        };
        if served {
            this.catch_up(true);
        }
        Ok(this)
    }

    /// What injects events from now on.
    pub fn injecting(&self) -> Injecting {
        self.injecting.clone()
    }

    /// Has the guest learn how keys, unless there are to be none, switches and axes are now, whatever it was told.
    fn catch_up(&mut self, keys: bool) {
        let source = self.source.as_ref();
        let pressed = source.and_then(|source| source.pressed().ok());
        let pressed: BTreeSet<u16> = pressed.filter(|_| keys).unwrap_or_default();
        for key in self.description.keys() {
            // Of one that it was told of it may not know where the report ended. Linux minds no event twice.
            let is_pressed = pressed.contains(&key);
            if is_pressed || self.kept.pressed().contains(&key) {
                self.waiting.push_back(Event::key(key, is_pressed));
            }
        }
        if let Some(source) = source {
            self.waiting.extend(source.places(&self.description));
        }
        if !self.waiting.is_empty() {
            self.waiting.push_back(Event::REPORT);
        }
    }

    /// Takes up some of what the source has.
    fn look(&mut self) {
        for _ in 0..LOOKS {
            let Some(source) = &self.source else { return };
            if self.waiting.len() >= MAX_WAITING {
                return;
            }
            match source.read() {
                Looked::Events(events) => events.into_iter().for_each(|event| self.came(event)),
                Looked::Nothing => {
                    // A key that is held when a driver comes is none of that one's.
                    let is_stale = std::mem::take(&mut self.is_stale);
                    if is_stale || self.is_dropping {
                        if std::mem::take(&mut self.is_dropping) {
                            self.waiting.clear();
                        }
                        self.catch_up(!is_stale);
                    }
                    return;
                }
                Looked::Gone => {
                    // The guest must not go on with keys that nobody holds any more.
                    self.source = None;
                    self.is_gone = true;
                    self.waiting.clear();
                    self.catch_up(true);
                }
            }
        }
        self.has_more = true;
    }

    /// The source has said `event`.
    fn came(&mut self, event: Event) {
        if event.is_dropped() {
            self.counters.losses += 1;
            self.is_dropping = true;
        }
        if self.is_stale || self.is_dropping {
            return;
        }
        if event.is_end() || self.description.has(event) {
            self.waiting.push_back(event);
        }
    }

    /// Somebody has injected `events`.
    fn inject(&mut self, mut events: Vec<Event>) {
        events.retain(|event| event.is_end() || self.description.has(*event));
        // Half of it would be something else; but what lets go of keys is always taken, as far as memory goes.
        let is_release =
            |event: &Event| event.is_end() || event.kind == kind::KEY && event.value == 0;
        let before = events.len();
        match self.waiting.len() {
            0..MAX_WAITING => {}
            MAX_WAITING..MOST_WAITING => events.retain(is_release),
            _ => events.clear(),
        }
        self.counters.dropped += (before - events.len()) as u64;
        self.waiting.extend(events);
    }

    /// Moves what there is to move. Whether it was anything.
    fn transfer(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let mut moved = false;
        for _ in 0..SIMPLE_BATCH {
            moved |= match self.hear()? {
                true => true,
                false => break,
            };
        }
        for _ in 0..SIMPLE_BATCH {
            moved |= match self.tell(access)? {
                true => true,
                false => break,
            };
        }
        Ok(moved)
    }

    /// Takes what the driver asks of the device, which does nothing of that: it has no lights.
    fn hear(&mut self) -> Result<bool, DeviceError> {
        let Some(queue) = self.queues.get(STATUS) else {
            return Ok(false);
        };
        let Some(request) = queue.pop()? else {
            return Ok(false);
        };
        self.counters.requests += 1;
        queue.complete(request.finish(0))?;
        Ok(true)
    }

    /// Gives the guest the next event.
    fn tell(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let (Some(event), Some(queue)) = (self.waiting.front(), self.queues.get(EVENTS)) else {
            return Ok(false);
        };
        let request = match self.buffer.take() {
            Some(held) => Some(held),
            None => queue.pop()?,
        };
        let Some(request) = request else {
            return Ok(false);
        };
        // The guest may see it from here on, whatever becomes of this process.
        if event.kind == kind::KEY && event.value != 0 {
            self.kept.set_pressed(event.code, true);
            self.released.retain(|key| *key != event.code);
        }
        let bytes = event.to_bytes();
        let written = match self.scratch.write(&bytes, &request.writable, access) {
            Err(fault) if fault.is_dom0s() => {
                self.buffer = Some(request);
                return Err(TransferError::Dom0(fault));
            }
            written => written.unwrap_or(0),
        };
        self.counters.requests += 1;
        let written = match written == bytes.len() {
            true => {
                if event.kind == kind::KEY && event.value == 0 {
                    self.released.push(event.code);
                }
                self.waiting.pop_front();
                self.counters.events += 1;
                written
            }
            // The next buffer has it.
            false => {
                self.counters.malformed += 1;
                0
            }
        };
        queue.complete(request.finish(written))?;
        Ok(true)
    }
}

impl Device for Input {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        let [select, subselect] = self.kept.selected();
        let answer = self.description.answer(select, subselect);
        let mut space = vec![0; ANSWER];
        (space[0], space[1]) = (select, subselect);
        space[ANSWER_LEN] = u8::try_from(answer.len()).expect("no more than has room");
        space.extend(answer);
        read_space(&space, offset, to);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        for (place, value) in (offset..2).zip(data) {
            self.kept.select(place, *value);
        }
    }

    fn update(&mut self) -> bool {
        let injected = self.injecting.0.take();
        let has_driver = self.queues.get(EVENTS).is_some();
        for events in injected {
            match has_driver {
                true => self.inject(events),
                false => self.counters.dropped += events.len() as u64,
            }
        }
        false
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        // A buffer that is empty still, and what nobody does.
        self.queues.start(index, start, Unfinished::Repeat, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let looks = self.unlooked.is_multiple_of(STEPS_PER_CLIENT_LOOK) || self.has_more;
        self.unlooked = self.unlooked.wrapping_add(1);
        self.has_more = false;
        if looks {
            self.look();
        }
        let mut step = Step::default();
        if self.has_more {
            step.activity = Activity::Working;
        }
        if self.shortage.holds() {
            return Ok(step);
        }
        match self.transfer(access) {
            Ok(moved) => {
                self.shortage.end();
                if moved {
                    step.activity = Activity::Working;
                }
            }
            Err(TransferError::Dom0(fault)) => {
                let doing = "copying an input device's events";
                self.shortage.note(doing, &fault, Instant::now());
            }
            Err(TransferError::Device(error)) => return Err(error),
        }
        step.interrupt = self.queues.publish()?;
        for key in std::mem::take(&mut self.released) {
            self.kept.set_pressed(key, false);
        }
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        // What woke us may have been the source, which tells once.
        self.unlooked = 0;
        let mut step = self.step(access)?;
        if self.shortage.holds() {
            return Ok(step);
        }
        for (index, is_wanted) in [(EVENTS, !self.waiting.is_empty()), (STATUS, true)] {
            if is_wanted
                && let Some(queue) = self.queues.get(index)
                && (queue.resume_kicks()? || queue.available()? > 0)
            {
                step.activity = Activity::Working;
            }
        }
        Ok(step)
    }

    fn try_again_at(&self) -> Option<Instant> {
        self.shortage.try_at()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        if let Some(source) = &self.source {
            add(source.fd(), Interest::Readable);
        }
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        if index.get() == EVENTS {
            self.buffer = None;
            self.shortage.forget();
        }
    }

    fn reset(&mut self) {
        self.kept.forget();
        self.waiting.clear();
        self.released.clear();
        self.is_stale = true;
        self.is_dropping = false;
        // The next driver's first step throws that away.
        self.unlooked = 0;
    }

    fn warning(&self) -> Option<String> {
        let gone = "its device in dom0 was taken away: when it is back, end the guest's worker, and the next one has it";
        self.shortage
            .warning()
            .or_else(|| self.is_gone.then(|| gone.to_owned()))
    }

    fn counters(&self) -> RequestCounters {
        RequestCounters {
            done: self.counters.requests,
            failed: self.counters.malformed,
        }
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("events", self.counters.events);
        add("dropped", self.counters.dropped);
        add("losses", self.counters.losses);
        add("malformed", self.counters.malformed);
    }
}
