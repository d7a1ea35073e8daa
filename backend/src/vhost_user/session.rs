//! What is said with one back-end, from the first message to the last. Nothing here waits: what was asked is answered later,
//! in the order in which it was asked ("Communication").

mod conversing;
mod error;

pub use conversing::connection_name;
pub use error::SessionError;
pub(crate) use error::of_system;

use super::class::{Class, MAX_QUEUES};
use super::connection::{Connection, ConnectionError, may_be_left_open};
use super::conversation::{Heard, Offer};
use super::message::{self, CONFIG_CHANGE, Message, PROTOCOL_FEATURES, Request, protocol};
use super::selections::{Selected, Selections};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// How long a back-end may take to answer, before another one is waited for.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Answers that a process can be owed when it dies: those for a start of all queues, and some.
const MOST_NOT_OURS: usize = 16 * MAX_QUEUES as usize;

/// Messages of its own that are taken of a back-end at once.
const TOGETHER: usize = 16;

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
    /// All that an earlier process has sent has been answered.
    TakenOver,
    LetGo(usize),
}

impl Owed {
    fn request(self) -> (Request, &'static str) {
        match self {
            Self::Features | Self::Serving => (Request::GetFeatures, "GET_FEATURES"),
            // No process asks for it but to begin with.
            Self::ProtocolFeatures | Self::TakenOver => {
                (Request::GetProtocolFeatures, "GET_PROTOCOL_FEATURES")
            }
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
    /// Answers to an earlier process, which are not ours to judge, may come before the first one to us: at most so many.
    not_ours: usize,
    /// The memory table was sent.
    knows_memory: bool,
    /// What it answers by what is selected, and what is to be asked still.
    selections: Selections,
    to_select: VecDeque<Selected>,
    /// Where it tells of what it was not asked, if it may.
    requests: Option<Connection>,
    /// There may be more of those than were taken.
    has_more: bool,
}

impl Session {
    /// Begins with the back-end at the other end of `socket`.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn begin(socket: OwnedFd, class: &'static Class) -> Result<Self, SessionError> {
        let mut this = Self::new(Connection::new(socket)?, class);
        this.send(Request::SetOwner, &[], None)?;
        this.ask(Owed::Features, &[])?;
        Ok(this)
    }

    /// Goes on with a back-end that an earlier process has had, and that has what `offer` says. [`Heard::TakenOver`] follows.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(super) fn take_over(
        socket: OwnedFd,
        class: &'static Class,
        offer: Offer,
    ) -> Result<Self, SessionError> {
        let mut this = Self::new(Connection::new(socket)?, class);
        this.offer = offer;
        this.not_ours = MOST_NOT_OURS;
        this.ask(Owed::TakenOver, &[])?;
        Ok(this)
    }

    fn new(connection: Connection, class: &'static Class) -> Self {
        Self {
            connection,
            class,
            owed: VecDeque::new(),
            due: None,
            protocol: 0,
            offer: Offer::default(),
            is_usable: false,
            not_ours: 0,
            knows_memory: false,
            selections: Selections::default(),
            to_select: VecDeque::new(),
            requests: None,
            has_more: false,
        }
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

    /// Takes up what the back-end says of itself.
    fn take_requests(&mut self) -> Result<(), SessionError> {
        let mut config_changed = false;
        self.has_more = true;
        for _ in 0..TOGETHER {
            let received = self.requests.as_ref().map(Connection::receive);
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
        let asks = self.reads_config() && !self.class.selects;
        if config_changed && asks && !self.owed.contains(&Owed::Config) {
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
            if owed == Owed::TakenOver && message.is_reply && self.not_ours > 0 {
                self.not_ours -= 1;
                return Ok(None);
            }
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
                let unwanted = if may_be_left_open() {
                    0
                } else {
                    protocol::BACKEND_REQ
                };
                self.agree(offered & protocol::KNOWN & !unwanted)?;
                return Ok(self.is_met());
            }
            Owed::TakenOver => {
                let offered = message.number().ok_or(odd)?;
                self.not_ours = 0;
                self.protocol = offered & protocol::KNOWN;
                self.have_requests()?;
                // A change may have been told to the last process.
                if self.reads_config() && !self.class.selects {
                    self.ask_config()?;
                }
                self.is_usable = true;
                return Ok(Some(Heard::TakenOver));
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
                if let Some(selected) = self.to_select.pop_front() {
                    let more = self.selections.take(selected, &config);
                    self.to_select.extend(more);
                    self.select()?;
                    return Ok(self.is_met());
                }
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
        self.have_requests()?;
        if self.reads_config() && self.class.selects {
            self.to_select = Selections::first();
            self.select()?;
        } else if self.reads_config() {
            self.ask_config()?;
        }
        Ok(())
    }

    /// Has a socket for what the back-end says of itself, if it may.
    fn have_requests(&mut self) -> Result<(), SessionError> {
        if self.protocol & protocol::BACKEND_REQ == 0 || !may_be_left_open() {
            return Ok(());
        }
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (ours, theirs) = pair.map_err(|error| ConnectionError::Socket(error.into()))?;
        let command = (Request::SetBackendReqFd, "SET_BACKEND_REQ_FD");
        self.command(command, &[], Some(theirs.as_fd()))?;
        self.requests = Some(Connection::new(ours)?);
        Ok(())
    }

    /// Asks what the back-end answers for what is to be selected next. When that is nothing, it has answered all.
    fn select(&mut self) -> Result<(), SessionError> {
        let Some((select, subsel)) = self.to_select.front() else {
            self.offer.config = self.selections.encoded();
            return Ok(());
        };
        let selected = message::config(0, &[*select, *subsel]);
        self.send(Request::SetConfig, &selected, None)?;
        self.ask_config()
    }

    /// The back-end's offer, when all of it is known.
    fn is_met(&mut self) -> Option<Heard> {
        let mut owed = self.owed.iter();
        let is_met = owed.all(|owed| matches!(owed, Owed::Obedience(..)));
        self.is_usable |= is_met;
        is_met.then(|| Heard::Offer(self.offer.clone()))
    }
}
