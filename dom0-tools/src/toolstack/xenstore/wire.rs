//! Messages on the wire (`struct xsd_sockmsg`, `xen/io/xs_wire.h`): four 32-bit numbers in the machine's
//! byte order, then the payload.

use std::io::{self, ErrorKind, Read, Write};

/// `XENSTORE_PAYLOAD_MAX`.
const PAYLOAD_MAX: usize = 4096;

/// `enum xsd_sockmsg_type`, as far as it is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Directory = 1,
    Read = 2,
    GetPermissions = 3,
    Watch = 4,
    Write = 11,
    Remove = 13,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: u32,
    pub(super) request: u32,
    pub(super) payload: Vec<u8>,
}

impl Message {
    pub(super) fn read(connection: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; 16];
        connection.read_exact(&mut header)?;
        let word = |index: usize| {
            u32::from_ne_bytes(
                header[4 * index..4 * index + 4]
                    .try_into()
                    .expect("four bytes"),
            )
        };
        let len = word(3) as usize;
        if len > PAYLOAD_MAX {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("a payload of {len} bytes"),
            ));
        }
        let mut payload = vec![0; len];
        connection.read_exact(&mut payload)?;
        Ok(Self {
            kind: word(0),
            request: word(1),
            payload,
        })
    }

    pub(super) fn write(&self, connection: &mut impl Write) -> io::Result<()> {
        if self.payload.len() > PAYLOAD_MAX {
            let len = self.payload.len();
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("a payload of {len} bytes"),
            ));
        }
        const NO_TRANSACTION: u32 = 0;
        let len = u32::try_from(self.payload.len()).expect("at most PAYLOAD_MAX");
        let mut message = Vec::with_capacity(16 + self.payload.len());
        for word in [self.kind, self.request, NO_TRANSACTION, len] {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        message.extend_from_slice(&self.payload);
        connection.write_all(&message)
    }
}
