//! The header before each frame (virtio 1.3, 5.1.6).

use super::offloads::Offloads;
use crate::tap::HEADER;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of an Ethernet header, without which there is no frame.
pub(super) const ETHERNET: usize = 14;

/// The most bytes of a frame with its header: what the largest segmented packet has, with an Ethernet header and its tags.
pub(super) const MAX_FRAME: usize = HEADER + (64 << 10) + ETHERNET + 8;

const FLAGS: usize = 0;
const GSO: usize = 1;
const NUM_BUFFERS: usize = 10;
/// What a kind of segmentation is, without the mark beside it.
const GSO_KIND: u8 = !low(VIRTIO_NET_HDR_GSO_ECN);
const NEEDS_CSUM: u8 = low(VIRTIO_NET_HDR_F_NEEDS_CSUM);

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader(pub(super) [u8; HEADER]);

/// What a frame leaves to whoever gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Left {
    /// The checksum of its transport header.
    checksum: bool,
    segments: Segments,
    /// Its segments carry marks of congestion.
    marks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segments {
    None,
    Tcp4,
    Tcp6,
    Udp,
    /// None that is offered in either direction.
    Other,
}

impl FrameHeader {
    /// What goes to the interface for a frame of a driver that has accepted `features`: `None` if the driver asks for what it has
    /// not accepted (virtio 1.3, 5.1.6.2.1).
    pub(super) fn to_send(self, features: u64) -> Option<Self> {
        let has = |bit: u32| features & 1 << bit != 0;
        let left = self.left();
        let segments = match left.segments {
            Segments::None => true,
            Segments::Tcp4 => has(VIRTIO_NET_F_HOST_TSO4),
            Segments::Tcp6 => has(VIRTIO_NET_F_HOST_TSO6),
            Segments::Udp => has(VIRTIO_NET_F_HOST_USO),
            Segments::Other => false,
        };
        let is_allowed = segments
            && (!left.checksum || has(VIRTIO_NET_F_CSUM))
            && (!left.marks || has(VIRTIO_NET_F_HOST_ECN))
            && (left.checksum || left.segments == Segments::None);
        let Self(mut bytes) = self;
        // Nothing else of the flags is the driver's to set.
        bytes[FLAGS] &= NEEDS_CSUM;
        bytes[NUM_BUFFERS..].fill(0);
        is_allowed.then_some(Self(bytes))
    }

    /// Whether a driver that takes `offloads` may see a frame with this header.
    pub(super) fn may_be_received(self, offloads: Offloads) -> bool {
        let left = self.left();
        let segments = match left.segments {
            Segments::None => true,
            Segments::Tcp4 => offloads.tcp4(),
            Segments::Tcp6 => offloads.tcp6(),
            Segments::Udp => offloads.udp(),
            Segments::Other => false,
        };
        segments && (!left.checksum || offloads.checksum()) && (!left.marks || offloads.marks())
    }

    /// The header of a frame that lies in `count` buffers, for a driver that takes `offloads`.
    pub(super) fn in_buffers(self, count: u16, offloads: Offloads) -> Self {
        let Self(mut bytes) = self;
        // 5.1.6.4.1: a driver that does not know of checksums is told nothing of them.
        if !offloads.checksum() {
            bytes[FLAGS] = 0;
        }
        bytes[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
        Self(bytes)
    }

    fn left(self) -> Left {
        let Self(bytes) = self;
        let kind = u32::from(bytes[GSO] & GSO_KIND);
        let segments = match kind {
            VIRTIO_NET_HDR_GSO_NONE => Segments::None,
            VIRTIO_NET_HDR_GSO_TCPV4 => Segments::Tcp4,
            VIRTIO_NET_HDR_GSO_TCPV6 => Segments::Tcp6,
            VIRTIO_NET_HDR_GSO_UDP_L4 => Segments::Udp,
            _ => Segments::Other,
        };
        Left {
            checksum: bytes[FLAGS] & NEEDS_CSUM != 0,
            segments,
            marks: bytes[GSO] & !GSO_KIND != 0,
        }
    }
}

/// The byte that a constant fits in.
pub(super) const fn low(value: u32) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_net::VIRTIO_NET_HDR_GSO_UDP;

    fn header(flags: u8, gso: u32) -> FrameHeader {
        let mut bytes = [0; HEADER];
        (bytes[FLAGS], bytes[GSO]) = (flags, low(gso));
        FrameHeader(bytes)
    }

    #[test]
    fn a_driver_sends_what_it_has_accepted_and_nothing_else() {
        let csum = 1 << VIRTIO_NET_F_CSUM;
        let tso4 = csum | 1 << VIRTIO_NET_F_HOST_TSO4;
        let ecn = VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN;
        let rows = [
            (0, 0, 0, true),
            (NEEDS_CSUM, 0, 0, false),
            (NEEDS_CSUM, 0, csum, true),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, csum, false),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, tso4, true),
            // 5.1.6.2.1: segments need a checksum.
            (0, VIRTIO_NET_HDR_GSO_TCPV4, tso4, false),
            (NEEDS_CSUM, ecn, tso4, false),
            (NEEDS_CSUM, ecn, tso4 | 1 << VIRTIO_NET_F_HOST_ECN, true),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV6, tso4, false),
            (
                NEEDS_CSUM,
                VIRTIO_NET_HDR_GSO_TCPV6,
                csum | 1 << VIRTIO_NET_F_HOST_TSO6,
                true,
            ),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4, tso4, false),
            (
                NEEDS_CSUM,
                VIRTIO_NET_HDR_GSO_UDP_L4,
                csum | 1 << VIRTIO_NET_F_HOST_USO,
                true,
            ),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP, u64::MAX, false),
            (NEEDS_CSUM, 0x7f, u64::MAX, false),
            (0, VIRTIO_NET_HDR_GSO_ECN, csum, false),
        ];
        for (flags, gso, features, is_allowed) in rows {
            let sent = header(flags, gso).to_send(features);
            assert_eq!(sent.is_some(), is_allowed, "{flags} {gso} {features:#x}");
        }
        let sent = FrameHeader([0xff; HEADER]);
        let FrameHeader(bytes) = FrameHeader({
            let mut bytes = sent.0;
            bytes[GSO] = low(VIRTIO_NET_HDR_GSO_TCPV4);
            bytes
        })
        .to_send(u64::MAX)
        .unwrap();
        assert_eq!((bytes[FLAGS], &bytes[10..]), (NEEDS_CSUM, &[0, 0][..]));
    }

    #[test]
    fn a_driver_sees_what_it_takes_and_nothing_else() {
        use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4};
        let none = Offloads::accepted(0);
        let csum = Offloads::accepted(1 << VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
        let tso4 = Offloads::accepted(tso4);
        let rows = [
            (0, 0, none, true),
            // DATA_VALID says something and leaves nothing.
            (2, 0, none, true),
            (NEEDS_CSUM, 0, none, false),
            (NEEDS_CSUM, 0, csum, true),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, csum, false),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, tso4, true),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV6, tso4, false),
            (NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4, tso4, false),
            (
                NEEDS_CSUM,
                VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN,
                tso4,
                false,
            ),
        ];
        for (flags, gso, offloads, may) in rows {
            let header = header(flags, gso);
            assert_eq!(header.may_be_received(offloads), may, "{flags} {gso}");
            let FrameHeader(seen) = header.in_buffers(3, offloads);
            let known = if offloads.checksum() { flags } else { 0 };
            assert_eq!((seen[FLAGS], seen[NUM_BUFFERS]), (known, 3));
        }
    }
}
