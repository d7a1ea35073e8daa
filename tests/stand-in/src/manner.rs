//! What a back-end does that no back-end may, or leaves undone.

/// A message of the frontend, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub u32);

impl Request {
    pub const GET_FEATURES: Self = Self(1);
    pub const SET_FEATURES: Self = Self(2);
    pub const SET_OWNER: Self = Self(3);
    pub const SET_MEM_TABLE: Self = Self(5);
    pub const SET_VRING_NUM: Self = Self(8);
    pub const SET_VRING_ADDR: Self = Self(9);
    pub const SET_VRING_BASE: Self = Self(10);
    pub const GET_VRING_BASE: Self = Self(11);
    pub const SET_VRING_KICK: Self = Self(12);
    pub const SET_VRING_CALL: Self = Self(13);
    pub const GET_PROTOCOL_FEATURES: Self = Self(15);
    pub const SET_PROTOCOL_FEATURES: Self = Self(16);
    pub const GET_QUEUE_NUM: Self = Self(17);
    pub const SET_VRING_ENABLE: Self = Self(18);
    pub const SET_BACKEND_REQ_FD: Self = Self(21);
    pub const GET_CONFIG: Self = Self(24);
}

/// How a back-end behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Good,
    /// Closes the connection in place of obeying.
    EndsAt(Request),
    /// Does not answer from then on.
    SilentAt(Request),
    /// Says that it does not obey.
    Refuses(Request),
    /// Its answers have another version.
    OtherVersion,
    /// It announces a message of 4 GiB.
    HugeMessage,
    /// It sends an answer that nobody has asked for.
    UnaskedAnswer,
    /// It answers with what is no answer.
    NoAnswer,
    /// Half of an answer to this, with the length of all of it in front.
    ShortAnswer(Request),
    /// It has no queues, or too many.
    Queues(u64),
    /// Its configuration space is longer than it was asked for.
    LongConfig,
    /// … or cannot be read.
    NoConfig,
    /// It has no event indices, which is nothing wrong.
    NoEventIndex,
    /// It is of before virtio 1.
    Legacy,
    /// It sends descriptors along with every answer.
    Descriptors,
    /// It sends, out of band before every answer, a descriptor that takes long to close.
    OutOfBand,
    /// … and before a message of its own.
    OutOfBandRequests,
    /// It lets go of another queue than it was told.
    OtherQueue,
    /// It says that it would go on with an element that is not there.
    FarBase,
    /// It reads no message.
    ReadsNothing,
    /// It makes messages of its own as fast as it can.
    ConfigChanges,
    /// It asks for what no frontend does.
    OddRequests,
    /// What it does with its rings.
    At(Moment),
}

/// What a back-end does when it is kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It uses a request that does not exist.
    UnknownId,
    /// … of a number beyond the queue.
    HugeId,
    /// It uses a request twice.
    Twice,
    /// It has written more than there is room for.
    TooLong,
    /// Its index says that it has used all.
    IndexAhead,
    IndexBack,
    /// It writes all over the memory, again and again.
    Scribbles,
    /// It calls all the time.
    Calls,
    /// It makes reads and writes of what it has of ours wait.
    Blocks,
    /// It does nothing.
    Idle,
    /// It tries to cut the memory off.
    Shrinks,
    /// It gives the memory's pages back.
    Punches,
}

/// Every manner, by its name.
pub const MANNERS: &[(&str, Manner)] = &[
    ("good", Manner::Good),
    ("no-event-index", Manner::NoEventIndex),
    ("ends-at-owner", Manner::EndsAt(Request::SET_OWNER)),
    ("ends-at-features", Manner::EndsAt(Request::GET_FEATURES)),
    (
        "ends-at-protocol",
        Manner::EndsAt(Request::GET_PROTOCOL_FEATURES),
    ),
    (
        "ends-at-agreement",
        Manner::EndsAt(Request::SET_PROTOCOL_FEATURES),
    ),
    ("ends-at-queues", Manner::EndsAt(Request::GET_QUEUE_NUM)),
    (
        "ends-at-requests",
        Manner::EndsAt(Request::SET_BACKEND_REQ_FD),
    ),
    ("ends-at-config", Manner::EndsAt(Request::GET_CONFIG)),
    ("ends-at-driver", Manner::EndsAt(Request::SET_FEATURES)),
    ("ends-at-memory", Manner::EndsAt(Request::SET_MEM_TABLE)),
    ("ends-at-size", Manner::EndsAt(Request::SET_VRING_NUM)),
    ("ends-at-base", Manner::EndsAt(Request::SET_VRING_BASE)),
    ("ends-at-address", Manner::EndsAt(Request::SET_VRING_ADDR)),
    ("ends-at-call", Manner::EndsAt(Request::SET_VRING_CALL)),
    ("ends-at-kick", Manner::EndsAt(Request::SET_VRING_KICK)),
    ("ends-at-enable", Manner::EndsAt(Request::SET_VRING_ENABLE)),
    ("ends-at-stop", Manner::EndsAt(Request::GET_VRING_BASE)),
    (
        "silent-at-features",
        Manner::SilentAt(Request::GET_FEATURES),
    ),
    ("silent-at-config", Manner::SilentAt(Request::GET_CONFIG)),
    ("silent-at-memory", Manner::SilentAt(Request::SET_MEM_TABLE)),
    ("silent-at-stop", Manner::SilentAt(Request::GET_VRING_BASE)),
    ("refuses-memory", Manner::Refuses(Request::SET_MEM_TABLE)),
    ("refuses-enable", Manner::Refuses(Request::SET_VRING_ENABLE)),
    ("other-version", Manner::OtherVersion),
    ("huge-message", Manner::HugeMessage),
    ("unasked-answer", Manner::UnaskedAnswer),
    ("no-answer", Manner::NoAnswer),
    ("short-features", Manner::ShortAnswer(Request::GET_FEATURES)),
    ("short-config", Manner::ShortAnswer(Request::GET_CONFIG)),
    ("short-stop", Manner::ShortAnswer(Request::GET_VRING_BASE)),
    ("no-queues", Manner::Queues(0)),
    ("many-queues", Manner::Queues(1 << 40)),
    ("long-config", Manner::LongConfig),
    ("no-config", Manner::NoConfig),
    ("legacy", Manner::Legacy),
    ("descriptors", Manner::Descriptors),
    ("out-of-band", Manner::OutOfBand),
    ("out-of-band-requests", Manner::OutOfBandRequests),
    ("other-queue", Manner::OtherQueue),
    ("far-base", Manner::FarBase),
    ("reads-nothing", Manner::ReadsNothing),
    ("config-changes", Manner::ConfigChanges),
    ("odd-requests", Manner::OddRequests),
    ("unknown-id", Manner::At(Moment::UnknownId)),
    ("huge-id", Manner::At(Moment::HugeId)),
    ("twice", Manner::At(Moment::Twice)),
    ("too-long", Manner::At(Moment::TooLong)),
    ("index-ahead", Manner::At(Moment::IndexAhead)),
    ("index-back", Manner::At(Moment::IndexBack)),
    ("scribbles", Manner::At(Moment::Scribbles)),
    ("calls", Manner::At(Moment::Calls)),
    ("blocks", Manner::At(Moment::Blocks)),
    ("idle", Manner::At(Moment::Idle)),
    ("shrinks", Manner::At(Moment::Shrinks)),
    ("punches", Manner::At(Moment::Punches)),
];

impl Manner {
    /// The manner of that name.
    pub fn named(name: &str) -> Option<Self> {
        let mut manners = MANNERS.iter();
        let found = manners.find(|(known, _)| *known == name);
        found.map(|(_, manner)| *manner)
    }

    pub(crate) fn moment(self) -> Option<Moment> {
        match self {
            Self::At(moment) => Some(moment),
            _ => None,
        }
    }
}
