//! The device.

mod connecting;
mod device;
mod lasting;

pub use lasting::{Brought, Keep, Lasting, Link};

use super::class::Class;
use super::config_space::ConfigSpace;
use super::conversation::{Conversation, Driver, Heard, Offer};
use super::doorbell::Doorbell;
use super::events::Events;
use super::session::{SessionError, of_system};
use crate::device::{Device, DeviceError, Identity};
use crate::log_limit::LogLimit;
use crate::shadow::{Relay, RelayError};
use crate::vhost_kernel::Kernel;
use crate::virtqueue::{QueueIndex, QueueSet};
use std::io;
use std::time::Instant;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_guest_mapping::PAGE_SIZE;

/// What back-ends know the region's first byte by: no address of ours, and none of the guest's.
const BASE: u64 = 1 << 32;

/// Feature bits of a device type (virtio 1.3, 2.2). The others are the queues' and the transport's, which are ours.
const TYPE_FEATURES: u64 = !0 >> (64 - 24) | !0 << 50;

/// Steps between two looks at what the back-end says while there is always something to do.
const STEPS_PER_LOOK: u32 = 64;

/// What a device is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    pub class: &'static Class,
    /// The largest size of its queues, at most that of its class.
    pub queue_size: u16,
    /// Bytes for the data of its requests.
    pub pool: usize,
    /// What its configuration space has of ours, by its place there.
    pub config: Vec<(usize, Vec<u8>)>,
    /// Feature bits of ours, which the back-end need not know.
    pub features: u64,
}

/// A device that another process serves.
pub struct Frontend {
    identity: Identity,
    setup: Setup,
    config: ConfigSpace,
    queues: QueueSet,
    /// What its back-ends had at first.
    offer: Offer,
    /// The supervisor is told that this session's back-end knows its memory.
    shares: bool,
    /// Dropped before the relay, in whose region it may write.
    session: Option<Box<dyn Conversation>>,
    relay: Relay,
    link: Link,
    /// When the kernel is begun with again.
    again: Option<(Instant, Kernel)>,
    keep: Box<dyn Keep>,
    events: Events,
    /// What the back-end was told of each queue.
    told: Vec<Told>,
    /// The queues are served: kicks are of use.
    is_serving: bool,
    /// What the driver has accepted.
    features: u64,
    /// The configuration space has changed, and the driver does not know.
    config_changed: bool,
    /// Somebody may have said something since the last look.
    looks: bool,
    steps: u32,
    /// Why there is no back-end.
    absence: Option<String>,
    /// How often the kernel did not get on since the driver began.
    stuck: u32,
    /// Connections that were begun with.
    connections: u64,
    log_limit: LogLimit,
}

/// What a back-end was told of a queue.
enum Told {
    Nothing,
    /// To serve it.
    Start(Doorbell),
    /// To let go of it.
    Stop,
}

impl Frontend {
    /// A device whose back-ends have what `offer` says, and are brought by `link`; it goes on from what is `lasting`, but for
    /// the back-end of an earlier process: [`Frontend::inherit`].
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(
        setup: Setup,
        offer: &Offer,
        link: Link,
        lasting: Lasting,
    ) -> Result<Self, SessionError> {
        // Each back-end comes with a memory, and before the first nothing has any.
        Self::with_pool(setup, PAGE_SIZE, offer, link, lasting)
    }

    /// As [`Frontend::new`], with `pool` bytes for the first back-end.
    fn with_pool(
        setup: Setup,
        pool: usize,
        offer: &Offer,
        link: Link,
        lasting: Lasting,
    ) -> Result<Self, SessionError> {
        let Lasting {
            written,
            mut records,
            keep,
        } = lasting;
        let class = setup.class;
        let count = usize::from(offer.queues);
        let sizes = vec![setup.queue_size; count];
        records.truncate(count);
        let relay = Relay::new(&sizes, pool, BASE, class.rules, records);
        let features = offer.features & TYPE_FEATURES & !class.without_features;
        let own = setup.config.clone();
        let mut config = ConfigSpace::new(class, own, &written);
        config.take(&offer.config);
        Ok(Self {
            identity: Identity {
                device_type: class.device_type,
                features: features | setup.features | 1 << VIRTIO_RING_F_EVENT_IDX,
                queue_sizes: sizes,
            },
            setup,
            config,
            queues: QueueSet::new(count),
            session: None,
            relay: relay.map_err(of_system)?,
            offer: offer.clone(),
            shares: false,
            link,
            again: None,
            keep,
            events: Events::new()?,
            told: (0..count).map(|_| Told::Nothing).collect(),
            is_serving: false,
            features: 0,
            config_changed: false,
            looks: false,
            steps: 0,
            absence: Some("it has not come yet".to_owned()),
            stuck: 0,
            connections: 0,
            log_limit: LogLimit::default(),
        })
    }

    /// Takes up what the back-end says, and tells it what there is to tell. True if there was anything.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] for a back-end on which no driver can rely.
    fn converse(&mut self) -> Result<bool, DeviceError> {
        let is_due = |due: Instant| due <= Instant::now();
        let looks = self.looks
            || self.steps.is_multiple_of(STEPS_PER_LOOK)
            || self.try_again_at().is_some_and(is_due);
        self.steps = self.steps.wrapping_add(1);
        if !looks {
            return Ok(false);
        }
        self.looks = false;
        self.begin_again();
        let conversed = self.hear().and_then(|heard| Ok(self.tell()? || heard));
        // What the kernel was told it has answered.
        let session = self.session.as_ref();
        self.looks |= session.is_some_and(|session| session.has_more());
        conversed.or_else(|error| self.give_up(error).map(|()| true))
    }

    /// Whether the back-end may have said something, or should have.
    fn is_told(&mut self) -> Result<bool, SessionError> {
        let now = Instant::now();
        let session = self.session.as_ref();
        let is_due = session.is_some_and(|session| {
            session.has_more() || session.due().is_some_and(|due| due <= now)
        });
        Ok(self.events.take()? || is_due)
    }

    fn hear(&mut self) -> Result<bool, SessionError> {
        if !self.is_told()? {
            return Ok(false);
        }
        let mut heard_any = false;
        while let Some(session) = &mut self.session
            && let Some(heard) = session.hear()?
        {
            heard_any = true;
            match heard {
                Heard::Offer(offer) => self.welcome(&offer)?,
                Heard::TakenOver => {
                    self.absence = None;
                    self.tell_to_stop()?;
                }
                Heard::Serving => {
                    self.is_serving = true;
                    // Some back-ends lose a kick that came while a queue was being enabled.
                    for told in &self.told {
                        if let Told::Start(doorbell) = told {
                            doorbell.ring();
                        }
                    }
                }
                Heard::LetGo { queue, next } => self.let_go(queue, next)?,
                Heard::Config(config) => self.change_config(&config),
            }
        }
        let session = self.session.as_ref();
        Ok(heard_any || session.is_some_and(|session| session.has_more()))
    }

    /// A back-end has come in place of one that the driver has had.
    fn welcome(&mut self, offer: &Offer) -> Result<(), SessionError> {
        let needed = u16::try_from(self.told.len()).expect("few queues");
        if offer.queues < needed {
            let queues = offer.queues.into();
            return Err(SessionError::Queues { queues, needed });
        }
        if self.absence.take().is_some() && self.connections > 1 && self.log_limit.allow() {
            tracing::info!("a back-end is there");
        }
        if let Some(session) = &self.session {
            self.events.watch(&**session)?;
        }
        self.change_config(&offer.config);
        Ok(())
    }

    fn change_config(&mut self, config: &[u8]) {
        if self.config.take(config) {
            // What the driver sees from now on it sees also after the death of this process.
            self.keep.back_ends(config);
            self.config_changed = true;
        }
    }

    fn let_go(&mut self, queue: usize, next: u16) -> Result<(), SessionError> {
        let index = self.index(queue);
        if !self.relay.has_all_back(index, next) {
            return Err(SessionError::Unfinished { queue });
        }
        self.relay.settle(index);
        self.told[queue] = Told::Nothing;
        if self.told.iter().all(|told| matches!(told, Told::Nothing)) {
            self.is_serving = false;
            self.relay.take_over();
            if let Some(session) = &mut self.session {
                session.reset()?;
            }
        }
        Ok(())
    }

    /// Has the back-end let go of all queues, whichever it serves.
    fn tell_to_stop(&mut self) -> Result<(), SessionError> {
        if let Some(session) = &mut self.session {
            self.events.watch(&**session)?;
            for queue in 0..self.told.len() {
                session.stop(queue)?;
                self.told[queue] = Told::Stop;
            }
        }
        Ok(())
    }

    fn index(&self, queue: usize) -> QueueIndex {
        let number = u32::try_from(queue).expect("few queues");
        QueueIndex::new(number, self.told.len()).expect("a queue of the device")
    }

    /// Has the back-end serve the queues that the driver has started. True if it was told of any.
    fn tell(&mut self) -> Result<bool, SessionError> {
        let Some(session) = &mut self.session else {
            return Ok(false);
        };
        if !session.is_usable() {
            return Ok(false);
        }
        // The next driver's features are told when nothing of the last one's is served.
        if self.told.iter().any(|told| matches!(told, Told::Stop)) {
            return Ok(false);
        }
        // What it has used is the guest's first.
        let event_idx = session.offer().features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
            && !self.setup.class.without_event_idx;
        if self.relay.is_lost() && !self.relay.resume(event_idx).map_err(of_system)? {
            self.looks = true;
            return Ok(false);
        }
        let mut begins = self.told.iter().all(|told| matches!(told, Told::Nothing));
        let mut any = false;
        for queue in 0..self.told.len() {
            let Some(active) = self.queues.get(queue) else {
                continue;
            };
            let index = active.index();
            if !matches!(self.told[queue], Told::Nothing) || !self.relay.is_settled(index) {
                continue;
            }
            let session = self.session.as_mut().expect("it is there");
            if std::mem::take(&mut begins) {
                let own = self.features & TYPE_FEATURES & !self.setup.features;
                let lacking = own & !session.offer().features;
                if lacking != 0 {
                    return Err(SessionError::Needs(lacking));
                }
                if let Some((place, written)) = self.config.to_tell() {
                    session.write_config(place, written)?;
                }
                let accepted = own | u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX;
                self.events.renew_call()?;
                let driver = Driver {
                    accepted: self.features,
                    of_back_end: accepted,
                };
                session.prepare(driver, self.relay.region(), BASE)?;
                if let Some(connection) = session.connection()
                    && !std::mem::replace(&mut self.shares, true)
                {
                    self.link.shared.set(Some(connection));
                    // Whoever sleeps next looks for it first.
                    self.events.wake();
                }
            }
            if !self.relay.relays(index) {
                self.relay.start(index, event_idx);
            }
            let rings = &self.relay.region().rings()[queue];
            let doorbell = session.start(queue, rings, BASE, self.events.call())?;
            self.told[queue] = Told::Start(doorbell);
            any = true;
        }
        if any && let Some(session) = &mut self.session {
            session.started()?;
        }
        Ok(any)
    }

    /// Shows the driver what is complete.
    fn publish(&mut self) -> Result<bool, DeviceError> {
        let relay = &self.relay;
        self.queues.publish_whole(|index| relay.is_whole(index))
    }

    fn of_relay(&mut self, error: RelayError) -> Result<(), DeviceError> {
        match error {
            RelayError::Device(error) => Err(error),
            RelayError::Backend { queue, fault } => {
                self.give_up(SessionError::Rings { queue, fault })
            }
        }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        of_system(error)
    }
}
