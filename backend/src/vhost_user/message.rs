//! Messages as they stand on the socket ("Vhost-user Protocol", QEMU's `docs/interop/vhost-user.rst`): a header of three 32-bit
//! words, and a payload, in the byte order of the machine.

/// Bytes of a header: request, flags, bytes of the payload.
pub(super) const HEADER: usize = 12;
/// The largest payload that is taken: a configuration space of 256 bytes has the largest that there is.
pub(super) const MAX_PAYLOAD: usize = 1024;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Of the frontend ("Front-end message types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    SetStatus = 39,
}

impl Request {
    fn number(self) -> u32 {
        self as u32
    }
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, of the back-end ("Back-end message types").
pub(super) const CONFIG_CHANGE: u32 = 2;

/// "Protocol features".
pub(super) mod protocol {
    pub(in super::super) const MQ: u64 = 1 << 0;
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    pub(in super::super) const BACKEND_REQ: u64 = 1 << 5;
    pub(in super::super) const CONFIG: u64 = 1 << 9;
    pub(in super::super) const STATUS: u64 = 1 << 16;
    /// Those that are acted on.
    pub(in super::super) const KNOWN: u64 = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | STATUS;
}

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The index of a ring whose message carries no descriptor ("A vring address description").
const NO_DESCRIPTOR: u64 = 1 << 8;

/// A message that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) is_reply: bool,
    pub(super) needs_reply: bool,
    pub(super) payload: Vec<u8>,
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("its message {request} has the version {version}, and not {VERSION}")]
    Version { request: u32, version: u32 },
    #[error("its message {request} has {bytes} bytes, and at most {MAX_PAYLOAD} are taken")]
    Size { request: u32, bytes: u32 },
}

impl Message {
    /// The first message of `bytes`, and its length. `None` if it is not whole yet.
    ///
    /// # Errors
    ///
    /// [`MessageError`].
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, MessageError> {
        let word = |index: usize| {
            let word = bytes.get(4 * index..4 * index + 4)?;
            Some(u32::from_ne_bytes(word.try_into().ok()?))
        };
        let (Some(request), Some(flags), Some(size)) = (word(0), word(1), word(2)) else {
            return Ok(None);
        };
        let version = flags & VERSION_MASK;
        if version != VERSION {
            return Err(MessageError::Version { request, version });
        }
        let end = match usize::try_from(size) {
            Ok(len) if len <= MAX_PAYLOAD => HEADER + len,
            _ => {
                let bytes = size;
                return Err(MessageError::Size { request, bytes });
            }
        };
        let Some(payload) = bytes.get(HEADER..end) else {
            return Ok(None);
        };
        let message = Self {
            request,
            is_reply: flags & REPLY != 0,
            needs_reply: flags & NEED_REPLY != 0,
            payload: payload.to_vec(),
        };
        Ok(Some((message, end)))
    }

    /// Whether it answers `request`.
    pub(super) fn answers(&self, request: Request) -> bool {
        self.is_reply && self.request == request.number()
    }

    /// The number of 64 bits that the payload is, if it is one.
    pub(super) fn number(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.payload.as_slice().try_into().ok()?))
    }

    /// The index and the number that the payload is ("A vring state description"), if it is that.
    pub(super) fn ring_state(&self) -> Option<(u32, u32)> {
        let (index, number) = self.payload.split_at_checked(4)?;
        Some((
            u32::from_ne_bytes(index.try_into().ok()?),
            u32::from_ne_bytes(number.try_into().ok()?),
        ))
    }

    /// The configuration space that the payload has ("A virtio device config space"), which may be empty: it cannot be read.
    pub(super) fn config(&self) -> Option<&[u8]> {
        let (_, config) = self.payload.split_at_checked(12)?;
        Some(config)
    }
}

/// A message to be sent.
pub(super) fn message(request: Request, needs_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if needs_reply { NEED_REPLY } else { 0 };
    encode(request.number(), flags, payload)
}

/// The answer to a back-end's message: whether it was obeyed.
pub(super) fn answer(request: u32, obeyed: bool) -> Vec<u8> {
    encode(request, VERSION | REPLY, &u64::from(!obeyed).to_ne_bytes())
}

fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("a short payload");
    let header = [request, flags, size].map(u32::to_ne_bytes);
    [&header.concat()[..], payload].concat()
}

pub(super) fn number(number: u64) -> Vec<u8> {
    number.to_ne_bytes().to_vec()
}

/// What the message says of ring `index`.
pub(super) fn ring_state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_ne_bytes).concat()
}

/// Where ring `index` is, by the frontend's addresses. Nothing is logged.
pub(super) fn ring_address(index: u32, descriptors: u64, available: u64, used: u64) -> Vec<u8> {
    let state = ring_state(index, 0);
    // "descriptor", "used", "available", "log".
    let addresses = [descriptors, used, available, 0].map(u64::to_ne_bytes);
    [state, addresses.concat()].concat()
}

/// A memory table of one region of `bytes`, from the beginning of its descriptor on, which both the guest and the frontend
/// know as `base`.
pub(super) fn memory_table(base: u64, bytes: u64) -> Vec<u8> {
    let count = ring_state(1, 0);
    // "guest address", "size", "user address", "mmap offset".
    let region = [base, bytes, base, 0].map(u64::to_ne_bytes);
    [count, region.concat()].concat()
}

/// For the descriptor of ring `index`, which goes beside.
pub(super) fn ring_descriptor(index: u32) -> Vec<u8> {
    debug_assert!(u64::from(index) < NO_DESCRIPTOR);
    number(index.into())
}

/// Asks for, or sets, bytes of the configuration space.
pub(super) fn config(offset: u32, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).expect("a configuration space");
    let header = [offset, size, 0].map(u32::to_ne_bytes);
    [&header.concat()[..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_when_it_is_whole() {
        let mut bytes = encode(15, VERSION | REPLY, &number(77));
        bytes.extend(encode(2, VERSION | NEED_REPLY, &[]));
        for end in 0..20 {
            assert_eq!(Message::parse(&bytes[..end]), Ok(None));
        }
        let (first, end) = Message::parse(&bytes).unwrap().unwrap();
        assert_eq!(end, 20);
        assert!(first.answers(Request::GetProtocolFeatures) && !first.needs_reply);
        assert_eq!(first.number(), Some(77));
        let (second, end) = Message::parse(&bytes[end..]).unwrap().unwrap();
        assert_eq!((second.request, end), (CONFIG_CHANGE, HEADER));
        assert!(second.needs_reply && !second.is_reply && second.number().is_none());
    }

    #[test]
    fn what_no_message_is_says_what_it_has() {
        let bytes = encode(9, 2, &[]);
        assert_eq!(
            Message::parse(&bytes),
            Err(MessageError::Version {
                request: 9,
                version: 2
            })
        );
        let mut bytes = encode(9, VERSION, &[]);
        bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(
            Message::parse(&bytes),
            Err(MessageError::Size {
                request: 9,
                bytes: u32::MAX
            })
        );
    }

    #[test]
    fn payloads_of_other_lengths_are_none() {
        let message = |payload: &[u8]| Message {
            request: 1,
            is_reply: true,
            needs_reply: false,
            payload: payload.to_vec(),
        };
        for len in 0..20 {
            let message = message(&vec![1; len]);
            assert_eq!(message.number().is_some(), len == 8);
            assert_eq!(message.ring_state().is_some(), len == 8);
            assert_eq!(message.config().map(<[u8]>::len), len.checked_sub(12));
        }
    }
}
