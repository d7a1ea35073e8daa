//! What is said with one back-end, from the first message to the last. Nothing here waits: what was asked is answered later,
//! in the order in which it was asked ("Communication").

use super::class::{Class, MAX_QUEUES};
use super::connection::{Connection, ConnectionError};
use super::message::{self, CONFIG_CHANGE, Message, PROTOCOL_FEATURES, Request, protocol};
use crate::shadow::{BackendFault, Region, RingPlaces};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};

/// How long a back-end may take to answer, before another one is waited for.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Messages of its own that are taken of a back-end at once.
const TOGETHER: usize = 16;

/// Why a back-end is given up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("it has not answered {request} for {} s", REPLY_LIMIT.as_secs())]
    Late { request: &'static str },
    #[error("it has let go of queue {queue} with requests that it had not finished")]
    Unfinished { queue: usize },
    #[error("its message {request} was not asked for")]
    Unasked { request: u32 },
    #[error("its answer to {request} has {bytes} bytes")]
    Answer { request: &'static str, bytes: usize },
    #[error("it does not take {request}: it answers {code}")]
    Refused { request: &'static str, code: u64 },
    #[error("it lets go of queue {found} where queue {queue} was to be")]
    Queue { queue: usize, found: u32 },
    #[error("it has not the features {0:#x} that a back-end needs")]
    Needs(u64),
    #[error("it has {queues} queues, and {needed} are needed")]
    Queues { queues: u64, needed: u16 },
    #[error("queue {queue}")]
    Rings {
        queue: usize,
        #[source]
        fault: BackendFault,
    },
}

impl SessionError {
    /// Whether it did what no back-end may, so that a driver cannot rely on what it has had from it.
    pub(super) fn is_misbehaviour(&self) -> bool {
        match self {
            Self::Connection(ConnectionError::Message(_) | ConnectionError::Descriptors) => true,
            Self::Connection(_) | Self::Late { .. } | Self::Unfinished { .. } => false,
            Self::Unasked { .. }
            | Self::Answer { .. }
            | Self::Refused { .. }
            | Self::Queue { .. }
            | Self::Needs(_)
            | Self::Queues { .. }
            | Self::Rings { .. } => true,
        }
    }
}

/// What a back-end has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// All of its feature bits.
    pub features: u64,
    pub queues: u16,
    /// Its configuration space, if it has one.
    pub config: Vec<u8>,
}

/// What has come of what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The back-end can be used.
    Offer(Offer),
    /// It serves all queues that it was told to.
    Serving,
    /// It has let go of a queue, and would have gone on with element `next` of its available ring.
    LetGo { queue: usize, next: u16 },
    /// Its configuration space has changed to this.
    Config(Vec<u8>),
}

/// An answer that is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    Features,
    ProtocolFeatures,
    QueueNum,
    Config,
    /// That a message was obeyed.
    Obedience(Request, &'static str),
    /// All that was sent before has been taken up.
    Serving,
    LetGo(usize),
}

impl Owed {
    fn request(self) -> (Request, &'static str) {
        match self {
            Self::Features | Self::Serving => (Request::GetFeatures, "GET_FEATURES"),
            Self::ProtocolFeatures => (Request::GetProtocolFeatures, "GET_PROTOCOL_FEATURES"),
            Self::QueueNum => (Request::GetQueueNum, "GET_QUEUE_NUM"),
            Self::Config => (Request::GetConfig, "GET_CONFIG"),
            Self::Obedience(request, name) => (request, name),
            Self::LetGo(_) => (Request::GetVringBase, "GET_VRING_BASE"),
        }
    }
}

pub(super) struct Session {
    connection: Connection,
    class: &'static Class,
    owed: VecDeque<Owed>,
    /// By when the first of them is to be there.
    due: Option<Instant>,
    /// The protocol features that were agreed on.
    protocol: u64,
    offer: Offer,
    is_usable: bool,
    /// It may have a socket to ask for something by.
    may_ask: bool,
    /// The memory table was sent.
    knows_memory: bool,
    /// Where it tells of what it was not asked, if it may.
    requests: Option<Connection>,
    /// There may be more of those than were taken.
    has_more: bool,
}

impl Session {
    /// Begins with the back-end at the other end of `socket`, which may ask for something itself if `may_ask`.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn begin(
        socket: OwnedFd,
        class: &'static Class,
        may_ask: bool,
    ) -> Result<Self, SessionError> {
        let mut this = Self {
            connection: Connection::new(socket),
            class,
            owed: VecDeque::new(),
            due: None,
            protocol: 0,
            offer: Offer::default(),
            is_usable: false,
            may_ask,
            knows_memory: false,
            requests: None,
            has_more: false,
        };
        this.send(Request::SetOwner, &[], None)?;
        this.ask(Owed::Features, &[])?;
        Ok(this)
    }

    /// Whether queues may be started.
    pub(super) fn is_usable(&self) -> bool {
        self.is_usable
    }

    pub(super) fn offer(&self) -> &Offer {
        &self.offer
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether [`Session::hear`] is to be called again though nothing tells of it.
    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }

    /// What is readable when the back-end says something.
    pub(super) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let requests = self.requests.as_ref().map(AsFd::as_fd);
        [self.connection.as_fd()].into_iter().chain(requests)
    }

    /// Ends the connection, for the supervisor too. True if a socket was left open: it has descriptors that the back-end has
    /// sent, and to close those can take as long as it likes. The other one the supervisor closes.
    pub(super) fn end(self) -> bool {
        self.connection.shut_down();
        let Some(requests) = self.requests else {
            return false;
        };
        requests.shut_down();
        let leaves = requests.has_descriptors().unwrap_or(true);
        if leaves {
            std::mem::forget(requests);
        }
        leaves
    }

    fn send(
        &self,
        request: Request,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), SessionError> {
        let message = message::message(request, false, payload);
        Ok(self.connection.send(&message, descriptor)?)
    }

    /// Sends a message, and has the back-end say that it has obeyed it, if it can.
    fn command(
        &mut self,
        (request, name): (Request, &'static str),
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), SessionError> {
        let acknowledges = self.protocol & protocol::REPLY_ACK != 0;
        let message = message::message(request, acknowledges, payload);
        self.connection.send(&message, descriptor)?;
        if acknowledges {
            self.owe(Owed::Obedience(request, name));
        }
        Ok(())
    }

    fn ask(&mut self, owed: Owed, payload: &[u8]) -> Result<(), SessionError> {
        self.send(owed.request().0, payload, None)?;
        self.owe(owed);
        Ok(())
    }

    fn owe(&mut self, owed: Owed) {
        self.owed.push_back(owed);
        if self.due.is_none() {
            self.due = Some(Instant::now() + REPLY_LIMIT);
        }
    }

    /// What is next of what the back-end has said, if it has said something.
    ///
    /// # Errors
    ///
    /// [`SessionError`]: it is to be given up.
    pub(super) fn hear(&mut self) -> Result<Option<Heard>, SessionError> {
        while let Some(message) = self.connection.receive()? {
            if let Some(heard) = self.take(&message)? {
                return Ok(Some(heard));
            }
        }
        self.take_requests()?;
        if let Some(due) = self.due
            && due <= Instant::now()
            && let Some(owed) = self.owed.front()
        {
            let (_, request) = owed.request();
            return Err(SessionError::Late { request });
        }
        Ok(None)
    }

    /// Takes up what the back-end says of itself.
    fn take_requests(&mut self) -> Result<(), SessionError> {
        let mut config_changed = false;
        self.has_more = true;
        for _ in 0..TOGETHER {
            let received = self.requests.as_mut().map(Connection::receive);
            let message = match received {
                Some(Ok(Some(message))) => message,
                None | Some(Ok(None)) => {
                    self.has_more = false;
                    break;
                }
                Some(Err(ConnectionError::Closed)) => {
                    self.requests = None;
                    continue;
                }
                Some(Err(error)) => return Err(error.into()),
            };
            if message.is_reply {
                let request = message.request;
                return Err(SessionError::Unasked { request });
            }
            let obeyed = message.request == CONFIG_CHANGE;
            config_changed |= obeyed;
            if message.needs_reply
                && let Some(requests) = &self.requests
            {
                let answer = message::answer(message.request, obeyed);
                requests.send(&answer, None)?;
            }
        }
        // One that is asked for already says all.
        if config_changed && self.reads_config() && !self.owed.contains(&Owed::Config) {
            self.ask_config()?;
        }
        Ok(())
    }

    fn reads_config(&self) -> bool {
        self.protocol & protocol::CONFIG != 0 && self.class.config_bytes > 0
    }

    fn ask_config(&mut self) -> Result<(), SessionError> {
        let space = vec![0; self.class.config_bytes];
        self.ask(Owed::Config, &message::config(0, &space))
    }

    fn take(&mut self, message: &Message) -> Result<Option<Heard>, SessionError> {
        let unasked = SessionError::Unasked {
            request: message.request,
        };
        let Some(owed) = self.owed.front().copied() else {
            return Err(unasked);
        };
        let (request, name) = owed.request();
        if !message.answers(request) {
            return Err(unasked);
        }
        self.owed.pop_front();
        self.due = (!self.owed.is_empty()).then(|| Instant::now() + REPLY_LIMIT);
        let odd = SessionError::Answer {
            request: name,
            bytes: message.payload.len(),
        };
        match owed {
            Owed::Features => {
                self.offer.features = message.number().ok_or(odd)?;
                let needed = PROTOCOL_FEATURES | 1 << VIRTIO_F_VERSION_1;
                let lacking = needed & !self.offer.features;
                if lacking != 0 {
                    return Err(SessionError::Needs(lacking));
                }
                self.ask(Owed::ProtocolFeatures, &[])?;
            }
            Owed::ProtocolFeatures => {
                let offered = message.number().ok_or(odd)?;
                let unwanted = if self.may_ask {
                    0
                } else {
                    protocol::BACKEND_REQ
                };
                self.agree(offered & protocol::KNOWN & !unwanted)?;
                return Ok(self.is_met());
            }
            Owed::QueueNum => {
                let queues = message.number().ok_or(odd)?;
                // It may say how many it could have.
                let most = queues.min(MAX_QUEUES.into());
                self.offer.queues = u16::try_from(most).expect("few queues");
                if self.offer.queues == 0 {
                    let needed = 1;
                    return Err(SessionError::Queues { queues, needed });
                }
                return Ok(self.is_met());
            }
            Owed::Config => {
                // One that cannot read it says so with no payload, or with an empty one.
                let config = match message.payload.is_empty() {
                    true => &[],
                    false => message.config().ok_or(odd)?,
                };
                let config = config[..config.len().min(self.class.config_bytes)].to_vec();
                if self.is_usable {
                    return Ok(Some(Heard::Config(config)));
                }
                self.offer.config = config;
                return Ok(self.is_met());
            }
            Owed::Obedience(_, request) => match message.number().ok_or(odd)? {
                0 => {}
                code => return Err(SessionError::Refused { request, code }),
            },
            Owed::Serving => return Ok(Some(Heard::Serving)),
            Owed::LetGo(queue) => {
                let (found, next) = message.ring_state().ok_or(odd)?;
                if usize::try_from(found) != Ok(queue) {
                    return Err(SessionError::Queue { queue, found });
                }
                // Some back-ends put a wrap counter above the index.
                let next = u16::try_from(next & 0xffff).expect("16 bits");
                return Ok(Some(Heard::LetGo { queue, next }));
            }
        }
        Ok(None)
    }

    /// Agrees on the protocol features `agreed`, and asks for what is to be known then.
    fn agree(&mut self, agreed: u64) -> Result<(), SessionError> {
        self.protocol = agreed;
        self.send(Request::SetProtocolFeatures, &message::number(agreed), None)?;
        self.offer.queues = self.class.queues;
        if agreed & protocol::MQ != 0 {
            self.ask(Owed::QueueNum, &[])?;
        }
        if agreed & protocol::BACKEND_REQ != 0 {
            let flags = SocketFlags::CLOEXEC;
            let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let (ours, theirs) = pair.map_err(|error| ConnectionError::Socket(error.into()))?;
            let command = (Request::SetBackendReqFd, "SET_BACKEND_REQ_FD");
            self.command(command, &[], Some(theirs.as_fd()))?;
            self.requests = Some(Connection::new(ours));
        }
        if self.reads_config() {
            self.ask_config()?;
        }
        Ok(())
    }

    /// The back-end's offer, when all of it is known.
    fn is_met(&mut self) -> Option<Heard> {
        let mut owed = self.owed.iter();
        let is_met = owed.all(|owed| matches!(owed, Owed::Obedience(..)));
        self.is_usable |= is_met;
        is_met.then(|| Heard::Offer(self.offer.clone()))
    }

    /// Tells the back-end what the driver has accepted, and which memory there is, before queues are started.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn prepare(
        &mut self,
        features: u64,
        region: &Region,
        base: u64,
    ) -> Result<(), SessionError> {
        let features = features | PROTOCOL_FEATURES | 1 << VIRTIO_F_VERSION_1;
        let command = (Request::SetFeatures, "SET_FEATURES");
        self.command(command, &message::number(features), None)?;
        if !std::mem::replace(&mut self.knows_memory, true) {
            let table = message::memory_table(base, region.bytes() as u64);
            let command = (Request::SetMemTable, "SET_MEM_TABLE");
            self.command(command, &table, Some(region.file().as_fd()))?;
        }
        Ok(())
    }

    /// Tells the back-end to serve queue `index`, from the beginning of its rings at `rings`: it looks at it when `kick` is
    /// readable, and writes to `call` when it has used something.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn start(
        &mut self,
        index: usize,
        rings: &RingPlaces,
        base: u64,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> Result<(), SessionError> {
        let ring = number_of(index);
        let at = |place: usize| base + place as u64;
        let addresses = message::ring_address(
            ring,
            at(rings.descriptors),
            at(rings.available),
            at(rings.used),
        );
        let size = message::ring_state(ring, rings.size.into());
        for (command, payload) in [
            ((Request::SetVringNum, "SET_VRING_NUM"), size),
            (
                (Request::SetVringBase, "SET_VRING_BASE"),
                message::ring_state(ring, 0),
            ),
            ((Request::SetVringAddr, "SET_VRING_ADDR"), addresses),
        ] {
            self.command(command, &payload, None)?;
        }
        let descriptor = message::ring_descriptor(ring);
        let command = (Request::SetVringCall, "SET_VRING_CALL");
        self.command(command, &descriptor, Some(call))?;
        let command = (Request::SetVringKick, "SET_VRING_KICK");
        self.command(command, &descriptor, Some(kick))?;
        let enabled = message::ring_state(ring, 1);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &enabled, None)
    }

    /// After the last queue was started: [`Heard::Serving`] follows.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn started(&mut self) -> Result<(), SessionError> {
        let ready = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK;
        self.set_status(ready)?;
        self.ask(Owed::Serving, &[])
    }

    fn set_status(&mut self, status: u32) -> Result<(), SessionError> {
        if self.protocol & protocol::STATUS == 0 {
            return Ok(());
        }
        let command = (Request::SetStatus, "SET_STATUS");
        self.command(command, &message::number(status.into()), None)
    }

    /// Tells the back-end to let go of queue `index`: [`Heard::LetGo`] follows.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn stop(&mut self, index: usize) -> Result<(), SessionError> {
        let ring = number_of(index);
        let disabled = message::ring_state(ring, 0);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &disabled, None)?;
        self.ask(Owed::LetGo(index), &message::ring_state(ring, 0))
    }

    /// The driver has reset the device, and the back-end has let go of its queues.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn reset(&mut self) -> Result<(), SessionError> {
        self.set_status(0)
    }

    /// The driver has written `data` at byte `offset` of the configuration space.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), SessionError> {
        if !self.reads_config() {
            return Ok(());
        }
        let offset = u32::try_from(offset).expect("in the configuration space");
        // Whether it obeys is between it and the driver.
        self.send(Request::SetConfig, &message::config(offset, data), None)
    }
}

fn number_of(index: usize) -> u32 {
    u32::try_from(index).expect("few queues")
}

/// A new session's part of a failure of the system.
pub(super) fn of_system(error: io::Error) -> SessionError {
    ConnectionError::Socket(error).into()
}
