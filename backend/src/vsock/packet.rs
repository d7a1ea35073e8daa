//! Packets (virtio 1.3, 5.10.6).

/// The number of whoever is not a guest (virtio 1.3, 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
const STREAM: u16 = 1;

/// The ports between which a connection is: each side has numbers of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What a packet is for: `VIRTIO_VSOCK_OP_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown(Done),
    Data,
    CreditUpdate,
    CreditRequest,
}

/// What a side does no more (`VIRTIO_VSOCK_SHUTDOWN_F_…`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) receiving: bool,
    pub(super) sending: bool,
}

impl Done {
    pub(super) const ALL: Self = Self {
        receiving: true,
        sending: true,
    };

    fn of_flags(flags: u32) -> Self {
        Self {
            receiving: flags & 1 != 0,
            sending: flags & 2 != 0,
        }
    }

    fn to_flags(self) -> u32 {
        u32::from(self.receiving) | u32::from(self.sending) << 1
    }

    /// What either of them says.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            receiving: self.receiving || other.receiving,
            sending: self.sending || other.sending,
        }
    }
}

/// What the sender of a packet has room for (virtio 1.3, 5.10.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// Bytes that it holds of a connection at most: `buf_alloc`.
    pub(super) buffer: u32,
    /// Bytes that it has passed on since the connection began, modulo 2^32: `fwd_cnt`.
    pub(super) forwarded: u32,
}

/// A packet, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) ports: Ports,
    pub(super) operation: Operation,
    pub(super) credit: Credit,
    /// Bytes of data behind the header.
    pub(super) len: u32,
}

/// What a guest may not send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It is dropped.
    Malformed,
    /// It is of no stream: answered by a reset (virtio 1.3, 5.10.6.4.1).
    Foreign(Ports),
}

impl Packet {
    /// Bytes of a header.
    pub(super) const HEADER: usize = 44;
    /// The most bytes of data behind it.
    pub(super) const MAX_DATA: usize = 64 << 10;

    /// The packet of which this is the header, sent by the guest `cid` with `behind` bytes after it.
    ///
    /// # Errors
    ///
    /// [`Unfit`].
    pub(super) fn from_guest(
        header: &[u8; Self::HEADER],
        cid: u64,
        behind: usize,
    ) -> Result<Self, Unfit> {
        let long = |at: usize| u64::from_le_bytes(*header[at..].first_chunk().expect("inside"));
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("inside"));
        let half = |at: usize| u16::from_le_bytes(*header[at..].first_chunk().expect("inside"));
        if (long(0), long(8)) != (cid, HOST_CID) {
            return Err(Unfit::Malformed);
        }
        let ports = Ports {
            guest: word(16),
            host: word(20),
        };
        if half(28) != STREAM {
            return Err(Unfit::Foreign(ports));
        }
        let operation = match half(30) {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown(Done::of_flags(word(32))),
            5 => Operation::Data,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            _ => return Err(Unfit::Foreign(ports)),
        };
        let len = word(24);
        if len as usize > behind {
            return Err(Unfit::Malformed);
        }
        Ok(Self {
            ports,
            operation,
            credit: Credit {
                buffer: word(36),
                forwarded: word(40),
            },
            len,
        })
    }

    /// The header of this packet for the guest `cid`.
    pub(super) fn to_guest(self, cid: u64) -> [u8; Self::HEADER] {
        let (operation, flags): (u16, u32) = match self.operation {
            Operation::Request => (1, 0),
            Operation::Response => (2, 0),
            Operation::Reset => (3, 0),
            Operation::Shutdown(done) => (4, done.to_flags()),
            Operation::Data => (5, 0),
            Operation::CreditUpdate => (6, 0),
            Operation::CreditRequest => (7, 0),
        };
        let mut header = [0; Self::HEADER];
        header[..8].copy_from_slice(&HOST_CID.to_le_bytes());
        header[8..16].copy_from_slice(&cid.to_le_bytes());
        header[16..20].copy_from_slice(&self.ports.host.to_le_bytes());
        header[20..24].copy_from_slice(&self.ports.guest.to_le_bytes());
        header[24..28].copy_from_slice(&self.len.to_le_bytes());
        header[28..30].copy_from_slice(&STREAM.to_le_bytes());
        header[30..32].copy_from_slice(&operation.to_le_bytes());
        header[32..36].copy_from_slice(&flags.to_le_bytes());
        header[36..40].copy_from_slice(&self.credit.buffer.to_le_bytes());
        header[40..].copy_from_slice(&self.credit.forwarded.to_le_bytes());
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CID: u64 = 0x1_0000_0007;

    /// A packet to the guest, as if the guest had sent it.
    fn turned(packet: Packet) -> [u8; Packet::HEADER] {
        let mut header = packet.to_guest(CID);
        for (one, other, len) in [(0, 8, 8), (16, 20, 4)] {
            for byte in 0..len {
                header.swap(one + byte, other + byte);
            }
        }
        header
    }

    fn packet(operation: Operation) -> Packet {
        Packet {
            ports: Ports {
                host: 0x0102_0304,
                guest: 0xa0b0_c0d0,
            },
            operation,
            credit: Credit {
                buffer: 1 << 18,
                forwarded: u32::MAX,
            },
            len: 100,
        }
    }

    #[test]
    fn a_packet_is_read_as_it_is_written() {
        let some = Done {
            receiving: false,
            sending: true,
        };
        for operation in [
            Operation::Request,
            Operation::Response,
            Operation::Reset,
            Operation::Shutdown(some),
            Operation::Shutdown(Done::ALL),
            Operation::Data,
            Operation::CreditUpdate,
            Operation::CreditRequest,
        ] {
            let packet = packet(operation);
            assert_eq!(Packet::from_guest(&turned(packet), CID, 100), Ok(packet));
        }
    }

    /// As `struct virtio_vsock_hdr` has it.
    #[test]
    fn the_header_is_laid_out_as_specified() {
        let header = packet(Operation::Data).to_guest(CID);
        let expected = [
            vec![2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0],
            vec![4, 3, 2, 1, 0xd0, 0xc0, 0xb0, 0xa0, 100, 0, 0, 0],
            vec![1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 4, 0, 255, 255, 255, 255],
        ];
        assert_eq!(header.to_vec(), expected.concat());
    }

    #[test]
    fn what_a_guest_may_not_send_is_told_apart() {
        let good = turned(packet(Operation::Data));
        let ports = packet(Operation::Data).ports;
        for (at, value, expected) in [
            (0, 9, Unfit::Malformed),
            (8, 3, Unfit::Malformed),
            (24, 101, Unfit::Malformed),
            (28, 2, Unfit::Foreign(ports)),
            (30, 0, Unfit::Foreign(ports)),
            (30, 8, Unfit::Foreign(ports)),
        ] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Packet::from_guest(&bad, CID, 100), Err(expected), "{at}");
        }
    }
}
