//! What a driver has set of its interface, which outlives the process that it told.

use super::command::{Command, Moderated};
use super::filter::{Addresses, Filter, MAX_ADDRESSES, Mac, VLAN_BYTES};
use super::interrupts::Moderation;
use super::offloads::Offloads;

/// What was set. All of it is forgotten when the driver resets the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Controls {
    pub(super) filter: Filter,
    /// Pairs of queues that are used.
    pub(super) pairs: u16,
    /// As the driver has chosen them, if it has.
    pub(super) offloads: Option<Offloads>,
    /// Of each queue but the control queue, as the driver has asked, if it has.
    pub(super) moderation: Vec<Option<Moderation>>,
    /// The driver is to announce itself (virtio 1.3, 5.1.4).
    pub(super) announce: bool,
    /// The link is up, as the driver knows.
    pub(super) is_up: bool,
}

/// A command that cannot be carried out.
#[derive(Debug)]
pub(super) struct Impossible;

const HAS_OFFLOADS: u8 = 1;
const ANNOUNCE: u8 = 2;
const DOWN: u8 = 4;
const UNICAST_OVERFLOW: u8 = 8;
const MULTICAST_OVERFLOW: u8 = 16;

impl Controls {
    /// Bytes of the controls of an interface with `pairs` pairs of queues.
    pub(super) const fn bytes(pairs: u16) -> usize {
        let fixed = 2 + 8 + 2 + 2 + size_of::<Mac>() + VLAN_BYTES;
        let addresses = 2 * MAX_ADDRESSES * size_of::<Mac>();
        fixed + addresses + 2 * pairs as usize * (1 + Moderation::BYTES)
    }

    /// As a reset leaves them.
    pub(super) fn new(mac: Mac, pairs: u16, is_up: bool) -> Self {
        Self {
            filter: Filter::new(mac),
            pairs: 1,
            offloads: None,
            moderation: vec![None; 2 * usize::from(pairs)],
            announce: false,
            is_up,
        }
    }

    /// Carries out a command; the answer to a question, if it is one.
    pub(super) fn apply(&mut self, command: Command) -> Result<Option<Moderation>, Impossible> {
        let queues = self.moderation.len();
        match command {
            Command::SetMode(mode, is_on) => self.filter.set(mode, is_on),
            Command::SetAddresses { unicast, multicast } => {
                self.filter.unicast = unicast;
                self.filter.multicast = multicast;
            }
            Command::SetMac(mac) => self.filter.mac = mac,
            Command::SetVlan(vlan, is_wanted) => self.filter.set_vlan(vlan, is_wanted),
            Command::Announced => self.announce = false,
            Command::SetPairs(pairs) => {
                if pairs == 0 || 2 * usize::from(pairs) > queues {
                    return Err(Impossible);
                }
                self.pairs = pairs;
            }
            Command::SetOffloads(offloads) => self.offloads = Some(offloads),
            Command::Moderate(which, moderation) => {
                let mut moderated = self.moderation.iter_mut().enumerate();
                match which {
                    Moderated::AllReceiving => moderated
                        .filter(|(queue, _)| queue % 2 == 0)
                        .for_each(|(_, of)| *of = Some(moderation)),
                    Moderated::AllSending => moderated
                        .filter(|(queue, _)| queue % 2 == 1)
                        .for_each(|(_, of)| *of = Some(moderation)),
                    Moderated::One(queue) => {
                        let of = moderated.nth(queue.into()).ok_or(Impossible)?;
                        *of.1 = Some(moderation);
                    }
                }
            }
            Command::AskModeration(queue) => {
                let of = self.moderation.get(usize::from(queue));
                let of = of.ok_or(Impossible)?;
                return Ok(Some(of.unwrap_or_default()));
            }
        }
        Ok(None)
    }

    /// For a later process.
    pub(super) fn write(&self) -> Vec<u8> {
        let Self {
            filter,
            pairs,
            offloads,
            moderation,
            announce,
            is_up,
        } = self;
        let flag = |flag: u8, is_set: bool| if is_set { flag } else { 0 };
        let flags = flag(HAS_OFFLOADS, offloads.is_some())
            | flag(ANNOUNCE, *announce)
            | flag(DOWN, !is_up)
            | flag(UNICAST_OVERFLOW, filter.unicast.overflow)
            | flag(MULTICAST_OVERFLOW, filter.multicast.overflow);
        let mut bytes = vec![flags, filter.modes];
        bytes.extend(offloads.unwrap_or_default().bits().to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        for addresses in [&filter.unicast, &filter.multicast] {
            bytes.push(u8::try_from(addresses.known.len()).expect("few addresses"));
        }
        bytes.extend(filter.mac);
        bytes.extend(filter.vlans);
        for addresses in [&filter.unicast, &filter.multicast] {
            bytes.extend(addresses.known.iter().flatten());
        }
        for of in moderation {
            bytes.push(of.is_some().into());
            bytes.extend(of.unwrap_or_default().bytes());
        }
        bytes
    }

    /// What an earlier process has [written](Self::write) of an interface that has `pairs` pairs of queues now; `None` if that is
    /// not it.
    pub(super) fn read(bytes: &[u8], pairs: u16) -> Option<Self> {
        let mut from = Reader(bytes);
        let [flags, modes] = from.take()?;
        let offloads = u64::from_le_bytes(from.take()?);
        let used = u16::from_le_bytes(from.take()?);
        let counts: [u8; 2] = from.take()?;
        let (mac, vlans) = (from.take()?, from.take()?);
        let mut addresses = |count: u8, overflow: u8| -> Option<Addresses> {
            let known = (0..count).map(|_| from.take());
            Some(Addresses {
                known: known.collect::<Option<_>>()?,
                overflow: flags & overflow != 0,
            })
        };
        let unicast = addresses(counts[0], UNICAST_OVERFLOW)?;
        let multicast = addresses(counts[1], MULTICAST_OVERFLOW)?;
        let queues = 2 * usize::from(pairs);
        let mut of_queue = || {
            let [is_asked] = from.take()?;
            let of = Moderation::read(from.take()?);
            Some((is_asked != 0).then_some(of))
        };
        let moderation = (0..queues).map(|_| of_queue());
        let moderation = moderation.collect::<Option<_>>()?;
        let chosen = Offloads::accepted(offloads);
        (1..=pairs).contains(&used).then_some(Self {
            filter: Filter {
                modes,
                mac,
                unicast,
                multicast,
                vlans,
            },
            pairs: used,
            offloads: (flags & HAS_OFFLOADS != 0).then_some(chosen),
            moderation,
            announce: flags & ANNOUNCE != 0,
            is_up: flags & DOWN == 0,
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::filter::Mode;

    const MAC: Mac = [0, 0x16, 0x3e, 0, 0, 1];

    #[test]
    fn a_later_process_reads_what_was_set() {
        let fresh = Controls::new(MAC, 4, true);
        assert_eq!(Controls::read(&fresh.write(), 4), Some(fresh.clone()));
        let mut set = fresh;
        let many = Addresses {
            known: vec![[2; 6]; MAX_ADDRESSES],
            overflow: false,
        };
        for command in [
            Command::SetMode(Mode::NoUnicast, true),
            Command::SetAddresses {
                unicast: many,
                multicast: Addresses {
                    known: vec![],
                    overflow: true,
                },
            },
            Command::SetMac([2; 6]),
            Command::SetVlan(4095, true),
            Command::SetPairs(4),
            Command::SetOffloads(Offloads::accepted(u64::MAX)),
            Command::Moderate(
                Moderated::One(7),
                Moderation {
                    max_packets: 1,
                    max_usecs: u32::MAX,
                },
            ),
        ] {
            assert!(set.apply(command).unwrap().is_none());
        }
        (set.announce, set.is_up) = (true, false);
        let bytes = set.write();
        assert!(bytes.len() <= Controls::bytes(4));
        assert_eq!(Controls::read(&bytes, 4), Some(set));
        for len in 0..bytes.len() {
            assert_eq!(Controls::read(&bytes[..len], 4), None, "{len}");
        }
        // Fewer pairs than are used.
        assert_eq!(Controls::read(&bytes, 3), None);
    }

    #[test]
    fn what_no_queue_has_is_impossible() {
        let mut controls = Controls::new(MAC, 2, true);
        let some = Moderation {
            max_packets: 3,
            max_usecs: 4,
        };
        for command in [
            Command::SetPairs(0),
            Command::SetPairs(3),
            Command::SetPairs(u16::MAX),
            Command::AskModeration(4),
            Command::Moderate(Moderated::One(4), some),
        ] {
            let before = controls.clone();
            assert!(controls.apply(command).is_err());
            assert_eq!(controls, before);
        }
        for which in [Moderated::AllReceiving, Moderated::One(1)] {
            controls.apply(Command::Moderate(which, some)).unwrap();
        }
        let asked = |queue| Controls::apply(&mut controls.clone(), Command::AskModeration(queue));
        let answers = [0, 1, 2, 3].map(|queue| asked(queue).unwrap().unwrap());
        assert_eq!(answers, [some, some, some, Moderation::default()]);
        controls
            .apply(Command::Moderate(
                Moderated::AllSending,
                Moderation::default(),
            ))
            .unwrap();
        assert_eq!(controls.moderation[1], Some(Moderation::default()));
        for pairs in [2, 2, 1] {
            controls.apply(Command::SetPairs(pairs)).unwrap();
            assert_eq!(controls.pairs, pairs);
        }
    }
}
