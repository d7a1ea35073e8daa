//! What a driver does for itself with the frames that it receives.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// The features that are such offloads (virtio 1.3, 5.1.6.5.6.1).
pub(super) const ALL: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | SEGMENTED_UDP;
/// Those of UDP, which an interface has both of or none.
pub(super) const SEGMENTED_UDP: u64 = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Bits of [`ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offloads(u64);

impl Offloads {
    /// Those of a driver that has accepted `features`.
    pub(super) fn accepted(features: u64) -> Self {
        Self(features & ALL)
    }

    /// Those that a command names, of a driver that has accepted `features`.
    pub(super) fn chosen(bits: u64, features: u64) -> Option<Self> {
        (bits & !(features & ALL) == 0).then_some(Self(bits))
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    pub(super) fn checksum(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_CSUM)
    }

    pub(super) fn tcp4(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_TSO4)
    }

    pub(super) fn tcp6(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_TSO6)
    }

    pub(super) fn marks(self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_ECN)
    }

    pub(super) fn udp(self) -> bool {
        self.0 & SEGMENTED_UDP == SEGMENTED_UDP
    }
}
