//! Which frames a driver wants (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).

use super::frame::ETHERNET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC,
};

/// An interface's address.
pub(super) type Mac = [u8; 6];

/// The addresses of each kind that are kept. Of a driver that has more, all frames of the kind are wanted.
pub(super) const MAX_ADDRESSES: usize = 32;
/// The numbers that a VLAN may have: those of 12 bits.
pub(super) const VLANS: u16 = 1 << 12;
pub(super) const VLAN_BYTES: usize = VLANS as usize / 8;

const BROADCAST: Mac = [0xff; 6];
/// Where a frame's type is, and of which type one with a tag is (IEEE 802.1Q).
const TYPE: usize = 12;
const TAGGED: [u8; 2] = [0x81, 0x00];
/// The bytes of a frame that are looked at.
pub(super) const LOOKED_AT: usize = ETHERNET + 2;

/// A way to receive, by the number of its command in `VIRTIO_NET_CTRL_RX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous = VIRTIO_NET_CTRL_RX_PROMISC as isize,
    AllMulticast = VIRTIO_NET_CTRL_RX_ALLMULTI as isize,
    AllUnicast = VIRTIO_NET_CTRL_RX_ALLUNI as isize,
    NoMulticast = VIRTIO_NET_CTRL_RX_NOMULTI as isize,
    NoUnicast = VIRTIO_NET_CTRL_RX_NOUNI as isize,
    NoBroadcast = VIRTIO_NET_CTRL_RX_NOBCAST as isize,
}

impl Mode {
    pub(super) const ALL: [Self; 6] = [
        Self::Promiscuous,
        Self::AllMulticast,
        Self::AllUnicast,
        Self::NoMulticast,
        Self::NoUnicast,
        Self::NoBroadcast,
    ];

    pub(super) fn command(self) -> u8 {
        self as u8
    }

    fn bit(self) -> u8 {
        1 << self.command()
    }
}

/// Addresses of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) known: Vec<Mac>,
    /// There are more than can be known.
    pub(super) overflow: bool,
}

impl Addresses {
    fn has(&self, mac: &[u8]) -> bool {
        self.overflow || self.known.iter().any(|known| known == mac)
    }
}

/// Which frames are received. What a driver without the control queue gets: every frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// A bit for each [`Mode`].
    pub(super) modes: u8,
    /// The interface's own address.
    pub(super) mac: Mac,
    pub(super) unicast: Addresses,
    pub(super) multicast: Addresses,
    /// A bit for each VLAN whose frames are wanted.
    pub(super) vlans: [u8; VLAN_BYTES],
}

impl Filter {
    /// As it is after a reset, of an interface with the address `mac`.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            modes: Mode::Promiscuous.bit(),
            mac,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: [0; VLAN_BYTES],
        }
    }

    pub(super) fn set(&mut self, mode: Mode, is_on: bool) {
        match is_on {
            true => self.modes |= mode.bit(),
            false => self.modes &= !mode.bit(),
        }
    }

    pub(super) fn set_vlan(&mut self, vlan: u16, is_wanted: bool) {
        let (byte, bit) = (usize::from(vlan / 8), 1 << (vlan % 8));
        match is_wanted {
            true => self.vlans[byte] |= bit,
            false => self.vlans[byte] &= !bit,
        }
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        self.vlans[usize::from(vlan / 8)] & 1 << (vlan % 8) != 0
    }

    /// Whether a frame is wanted that begins with `frame`, of which a driver wants the VLANs that it has named only if
    /// `by_vlan`.
    pub(super) fn wants(&self, frame: &[u8; LOOKED_AT], by_vlan: bool) -> bool {
        let has = |mode: Mode| self.modes & mode.bit() != 0;
        let to = &frame[..6];
        if has(Mode::Promiscuous) {
            return true;
        }
        if by_vlan && frame[TYPE..][..2] == TAGGED {
            let tag = u16::from_be_bytes([frame[ETHERNET], frame[ETHERNET + 1]]);
            if !self.has_vlan(tag % VLANS) {
                return false;
            }
        }
        if to == BROADCAST {
            return !has(Mode::NoBroadcast);
        }
        if to[0] & 1 != 0 {
            return !has(Mode::NoMulticast) && (has(Mode::AllMulticast) || self.multicast.has(to));
        }
        !has(Mode::NoUnicast) && (has(Mode::AllUnicast) || to == self.mac || self.unicast.has(to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [0, 0x16, 0x3e, 0, 0, 1];
    const OTHER: Mac = [0, 0x16, 0x3e, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    fn frame(to: Mac) -> [u8; LOOKED_AT] {
        let mut frame = [0; LOOKED_AT];
        frame[..6].copy_from_slice(&to);
        frame
    }

    fn tagged(to: Mac, vlan: u16) -> [u8; LOOKED_AT] {
        let mut frame = frame(to);
        frame[TYPE..ETHERNET].copy_from_slice(&TAGGED);
        frame[ETHERNET..].copy_from_slice(&vlan.to_be_bytes());
        frame
    }

    #[test]
    fn each_mode_does_what_it_says() {
        let kinds = [OWN, OTHER, BROADCAST, GROUP];
        let rows: [(&[Mode], [bool; 4]); 8] = [
            (&[Mode::Promiscuous, Mode::NoUnicast], [true; 4]),
            (&[], [true, false, true, false]),
            (&[Mode::AllMulticast], [true, false, true, true]),
            (&[Mode::AllUnicast], [true, true, true, false]),
            (&[Mode::NoUnicast], [false, false, true, false]),
            (&[Mode::NoBroadcast], [true, false, false, false]),
            (
                &[Mode::NoMulticast, Mode::AllMulticast],
                [true, false, true, false],
            ),
            (
                &[Mode::NoUnicast, Mode::AllUnicast],
                [false, false, true, false],
            ),
        ];
        for (modes, wanted) in rows {
            let mut filter = Filter::new(OWN);
            filter.set(Mode::Promiscuous, false);
            for mode in modes {
                filter.set(*mode, true);
            }
            assert_eq!(
                kinds.map(|to| filter.wants(&frame(to), true)),
                wanted,
                "{modes:?}"
            );
        }
    }

    #[test]
    fn addresses_and_vlans_that_were_named_are_wanted() {
        let mut filter = Filter::new(OWN);
        assert!(filter.wants(&tagged(OTHER, 5), true), "until it says more");
        filter.set(Mode::Promiscuous, false);
        filter.unicast.known.push(OTHER);
        assert!(filter.wants(&frame(OTHER), true) && !filter.wants(&frame(GROUP), true));
        filter.multicast.overflow = true;
        assert!(filter.wants(&frame(GROUP), true));
        assert!(!filter.wants(&tagged(OWN, 5), true) && filter.wants(&tagged(OWN, 5), false));
        filter.set_vlan(5, true);
        filter.set_vlan(VLANS - 1, true);
        // The three bits before it are a priority.
        for vlan in [5, 0xe005, VLANS - 1] {
            assert!(filter.wants(&tagged(OWN, vlan), true), "{vlan}");
        }
        filter.set_vlan(5, false);
        assert!(!filter.wants(&tagged(OWN, 5), true));
        assert!(!filter.wants(&tagged(OTHER, VLANS - 2), true));
    }
}
