//! What a driver asks for in the control queue (virtio 1.3, 5.1.6.5).

use super::filter::{Addresses, MAX_ADDRESSES, Mac, Mode, VLANS};
use super::interrupts::Moderation;
use super::offloads::Offloads;
use virtio_bindings::virtio_net as ids;

/// A command, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    SetMode(Mode, bool),
    SetAddresses {
        unicast: Addresses,
        multicast: Addresses,
    },
    SetMac(Mac),
    SetVlan(u16, bool),
    /// The driver has announced itself.
    Announced,
    SetPairs(u16),
    SetOffloads(Offloads),
    Moderate(Moderated, Moderation),
    AskModeration(u16),
}

/// The queues whose interrupts are moderated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moderated {
    AllReceiving,
    AllSending,
    /// The queue of this number.
    One(u16),
}

/// Bytes of a command before what it carries: its class and its number.
const HEAD: usize = 2;

impl Command {
    /// The command in `bytes`, of which a page at most is there, of a driver that has accepted `features`. `None` for one that
    /// there is not, that it has not accepted, or that says what cannot be.
    pub(super) fn read(bytes: &[u8], features: u64) -> Option<Self> {
        let has = |bit: u32| (features & 1 << bit != 0).then_some(());
        let (&[class, number], rest) = bytes.split_first_chunk::<HEAD>()?;
        let number = u32::from(number);
        match u32::from(class) {
            ids::VIRTIO_NET_CTRL_RX => {
                let mode = Mode::ALL
                    .into_iter()
                    .find(|mode| u32::from(mode.command()) == number)?;
                has(match mode {
                    Mode::Promiscuous | Mode::AllMulticast => ids::VIRTIO_NET_F_CTRL_RX,
                    _ => ids::VIRTIO_NET_F_CTRL_RX_EXTRA,
                })?;
                let [is_on] = whole(rest)?;
                Some(Self::SetMode(mode, is_on != 0))
            }
            ids::VIRTIO_NET_CTRL_MAC if number == ids::VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                has(ids::VIRTIO_NET_F_CTRL_RX)?;
                let (unicast, rest) = addresses(rest)?;
                let (multicast, _) = match unicast.overflow {
                    // Where the second table begins is beyond what was read.
                    true if rest.is_empty() => (unicast.clone(), rest),
                    _ => addresses(rest)?,
                };
                Some(Self::SetAddresses { unicast, multicast })
            }
            ids::VIRTIO_NET_CTRL_MAC if number == ids::VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                has(ids::VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                Some(Self::SetMac(whole(rest)?))
            }
            ids::VIRTIO_NET_CTRL_VLAN => {
                has(ids::VIRTIO_NET_F_CTRL_VLAN)?;
                let vlan = u16::from_le_bytes(whole(rest)?);
                let is_wanted = match number {
                    ids::VIRTIO_NET_CTRL_VLAN_ADD => true,
                    ids::VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return None,
                };
                (vlan < VLANS).then_some(Self::SetVlan(vlan, is_wanted))
            }
            ids::VIRTIO_NET_CTRL_ANNOUNCE if number == ids::VIRTIO_NET_CTRL_ANNOUNCE_ACK => {
                has(ids::VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                Some(Self::Announced)
            }
            ids::VIRTIO_NET_CTRL_MQ if number == ids::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                has(ids::VIRTIO_NET_F_MQ)?;
                Some(Self::SetPairs(u16::from_le_bytes(whole(rest)?)))
            }
            ids::VIRTIO_NET_CTRL_GUEST_OFFLOADS
                if number == ids::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET =>
            {
                has(ids::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                let bits = u64::from_le_bytes(whole(rest)?);
                Offloads::chosen(bits, features).map(Self::SetOffloads)
            }
            ids::VIRTIO_NET_CTRL_NOTF_COAL => moderation(number, rest, features),
            _ => None,
        }
    }
}

/// 5.1.6.5.7
fn moderation(number: u32, rest: &[u8], features: u64) -> Option<Command> {
    let has = |bit: u32| (features & 1 << bit != 0).then_some(());
    let all = |which| {
        has(ids::VIRTIO_NET_F_NOTF_COAL)?;
        Some(Command::Moderate(which, Moderation::read(whole(rest)?)))
    };
    match number {
        ids::VIRTIO_NET_CTRL_NOTF_COAL_TX_SET => all(Moderated::AllSending),
        ids::VIRTIO_NET_CTRL_NOTF_COAL_RX_SET => all(Moderated::AllReceiving),
        ids::VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET => {
            has(ids::VIRTIO_NET_F_VQ_NOTF_COAL)?;
            let (queue, rest) = queue_number(rest)?;
            let moderation = Moderation::read(whole(rest)?);
            Some(Command::Moderate(Moderated::One(queue), moderation))
        }
        ids::VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET => {
            has(ids::VIRTIO_NET_F_VQ_NOTF_COAL)?;
            queue_number(rest).map(|(queue, _)| Command::AskModeration(queue))
        }
        _ => None,
    }
}

/// A queue's number, of `struct virtio_net_ctrl_coal_vq`, and what is behind.
fn queue_number(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (&[low, high, _, _], rest) = bytes.split_first_chunk()?;
    Some((u16::from_le_bytes([low, high]), rest))
}

/// A table of addresses, and what is behind it.
fn addresses(bytes: &[u8]) -> Option<(Addresses, &[u8])> {
    let (&count, rest) = bytes.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(count)).ok()?;
    let len = count.checked_mul(size_of::<Mac>())?;
    let (table, behind) = rest.split_at_checked(len).unwrap_or((rest, &[]));
    let all = table.chunks_exact(size_of::<Mac>());
    let known = all.take(MAX_ADDRESSES);
    let known = known.map(|mac| mac.try_into().expect("six bytes"));
    let addresses = match count > MAX_ADDRESSES {
        true => Addresses {
            known: Vec::new(),
            overflow: true,
        },
        // Fewer than it says.
        false if table.len() < len => return None,
        false => Addresses {
            known: known.collect(),
            overflow: false,
        },
    };
    Some((addresses, behind))
}

/// `bytes`, if there are just so many.
fn whole<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn read(bytes: &[u8]) -> Option<Command> {
        Command::read(bytes, ALL)
    }

    fn table(count: u32, macs: usize) -> Vec<u8> {
        let mut bytes = count.to_le_bytes().to_vec();
        bytes.extend((0..macs).flat_map(|_| [0, 0x16, 0x3e, 0, 0, 1]));
        bytes
    }

    #[test]
    fn each_command_is_read_and_needs_its_feature() {
        let moderation = Moderation {
            max_packets: 2,
            max_usecs: 300,
        };
        let coal = [2, 0, 0, 0, 0x2c, 1, 0, 0];
        let with = |head: &[u8], rest: &[u8]| [head, rest].concat();
        let rows = [
            (
                vec![0, 0, 1],
                ids::VIRTIO_NET_F_CTRL_RX,
                Command::SetMode(Mode::Promiscuous, true),
            ),
            (
                vec![0, 5, 0],
                ids::VIRTIO_NET_F_CTRL_RX_EXTRA,
                Command::SetMode(Mode::NoBroadcast, false),
            ),
            (
                vec![1, 1, 1, 2, 3, 4, 5, 6],
                ids::VIRTIO_NET_F_CTRL_MAC_ADDR,
                Command::SetMac([1, 2, 3, 4, 5, 6]),
            ),
            (
                vec![2, 0, 0xff, 0xf],
                ids::VIRTIO_NET_F_CTRL_VLAN,
                Command::SetVlan(4095, true),
            ),
            (
                vec![2, 1, 1, 0],
                ids::VIRTIO_NET_F_CTRL_VLAN,
                Command::SetVlan(1, false),
            ),
            (
                vec![3, 0],
                ids::VIRTIO_NET_F_GUEST_ANNOUNCE,
                Command::Announced,
            ),
            (vec![4, 0, 2, 0], ids::VIRTIO_NET_F_MQ, Command::SetPairs(2)),
            (
                with(
                    &[5, 0],
                    &(1u64 << ids::VIRTIO_NET_F_GUEST_CSUM).to_le_bytes(),
                ),
                ids::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
                Command::SetOffloads(Offloads::accepted(1 << ids::VIRTIO_NET_F_GUEST_CSUM)),
            ),
            (
                with(&[6, 0], &coal),
                ids::VIRTIO_NET_F_NOTF_COAL,
                Command::Moderate(Moderated::AllSending, moderation),
            ),
            (
                with(&[6, 1], &coal),
                ids::VIRTIO_NET_F_NOTF_COAL,
                Command::Moderate(Moderated::AllReceiving, moderation),
            ),
            (
                with(&[6, 2, 3, 0, 0, 0], &coal),
                ids::VIRTIO_NET_F_VQ_NOTF_COAL,
                Command::Moderate(Moderated::One(3), moderation),
            ),
            (
                vec![6, 3, 1, 0, 0, 0],
                ids::VIRTIO_NET_F_VQ_NOTF_COAL,
                Command::AskModeration(1),
            ),
        ];
        for (bytes, feature, command) in rows {
            assert_eq!(read(&bytes), Some(command));
            assert_eq!(Command::read(&bytes, ALL & !(1 << feature)), None);
            assert_eq!(read(&bytes[..bytes.len() - 1]), None, "too short");
            if bytes[..2] != [3, 0] && bytes[..2] != [6, 3] {
                assert_eq!(read(&[&bytes[..], &[0]].concat()), None, "too long");
            }
        }
    }

    #[test]
    fn what_there_is_not_is_none() {
        for bytes in [
            &[][..],
            &[0],
            &[0, 6, 1],
            &[1, 2],
            &[2, 2, 1, 0],
            &[2, 0, 0, 0x10],
            &[3, 1],
            &[4, 1, 1, 0],
            &[6, 4, 0, 0, 0, 0],
            &[7, 0, 0],
            &[255, 255],
        ] {
            assert_eq!(read(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn tables_of_addresses_are_whole_or_too_large() {
        let set = |unicast: Vec<u8>, multicast: Vec<u8>| match read(
            &[vec![1, 0], unicast, multicast].concat(),
        )? {
            Command::SetAddresses { unicast, multicast } => Some((unicast, multicast)),
            other => panic!("{other:?}"),
        };
        let (unicast, multicast) = set(table(2, 2), table(1, 1)).unwrap();
        assert_eq!((unicast.known.len(), multicast.known.len()), (2, 1));
        let (unicast, multicast) = set(table(32, 32), table(33, 33)).unwrap();
        assert_eq!((unicast.known.len(), unicast.overflow), (32, false));
        assert_eq!((multicast.known.len(), multicast.overflow), (0, true));
        // More than the page that was read.
        let (unicast, multicast) = set(table(1000, 600), Vec::new()).unwrap();
        assert!(unicast.overflow && multicast.overflow);
        let (_, multicast) = set(table(0, 0), table(u32::MAX, 1)).unwrap();
        assert!(multicast.overflow);
        for (unicast, multicast) in [
            (table(2, 1), Vec::new()),
            (table(1, 1), Vec::new()),
            (table(0, 0), table(2, 1)),
            (vec![0], Vec::new()),
        ] {
            assert_eq!(set(unicast, multicast), None);
        }
    }
}
