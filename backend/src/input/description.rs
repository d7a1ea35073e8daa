//! What an input device has, as its driver reads it (virtio 1.3, 5.8.4 and 5.8.5).

use super::event::{Event, KEYS, kind};
use std::collections::{BTreeMap, BTreeSet};

/// The most bytes of an answer.
const LONGEST: usize = 128;

/// An input device, in the terms of `linux/input.h`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    pub serial: String,
    /// Bus, vendor, product and version.
    pub ids: [u16; 4],
    /// `INPUT_PROP_…`.
    pub properties: BTreeSet<u16>,
    /// The codes of each type, `EV_KEY` and others.
    pub codes: BTreeMap<u16, BTreeSet<u16>>,
    /// The absolute axes of the codes of type `EV_ABS`.
    pub axes: BTreeMap<u16, Axis>,
}

/// `struct input_absinfo`, without its value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Axis {
    pub minimum: i32,
    pub maximum: i32,
    pub fuzz: i32,
    pub flat: i32,
    pub resolution: i32,
}

impl Description {
    /// The types of events that a driver is told of, besides those that say where a report ends. Lights are none of them: whoever
    /// may switch a device's lights may also press its keys.
    pub const TYPES: [u16; 5] = [
        kind::KEY,
        kind::RELATIVE,
        kind::ABSOLUTE,
        kind::MISC,
        kind::SWITCH,
    ];

    /// Whether it can say `event`.
    pub fn has(&self, event: Event) -> bool {
        let codes = self.codes.get(&event.kind);
        Self::TYPES.contains(&event.kind) && codes.is_some_and(|codes| codes.contains(&event.code))
    }

    /// Its codes of a type, in order.
    pub(super) fn codes_of(&self, kind: u16) -> impl Iterator<Item = u16> {
        self.codes.get(&kind).into_iter().flatten().copied()
    }

    /// Its keys, in order.
    pub(super) fn keys(&self) -> impl Iterator<Item = u16> {
        let keys = self.codes_of(kind::KEY);
        keys.filter(|key| usize::from(*key) < KEYS)
    }

    /// What a driver reads that has selected this: nothing, if there is no such thing.
    pub(super) fn answer(&self, select: u8, subselect: u8) -> Vec<u8> {
        let mut answer = match (select, subselect) {
            (select::NAME, 0) => self.name.clone().into_bytes(),
            (select::SERIAL, 0) => self.serial.clone().into_bytes(),
            (select::IDS, 0) => self.ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
            (select::PROPERTIES, 0) => bits(&self.properties),
            (select::CODES, of) => {
                let of = u16::from(of);
                let codes = self.codes.get(&of).filter(|_| Self::TYPES.contains(&of));
                codes.map(bits).unwrap_or_default()
            }
            (select::AXIS, axis) => {
                let axis = self.axes.get(&axis.into());
                let numbers = axis.map(|axis| {
                    [
                        axis.minimum,
                        axis.maximum,
                        axis.fuzz,
                        axis.flat,
                        axis.resolution,
                    ]
                });
                let numbers = numbers.into_iter().flatten();
                numbers.flat_map(i32::to_le_bytes).collect()
            }
            _ => Vec::new(),
        };
        answer.truncate(LONGEST);
        answer
    }
}

/// What a driver selects: `VIRTIO_INPUT_CFG_…`.
mod select {
    pub(super) const NAME: u8 = 1;
    pub(super) const SERIAL: u8 = 2;
    pub(super) const IDS: u8 = 3;
    pub(super) const PROPERTIES: u8 = 0x10;
    pub(super) const CODES: u8 = 0x11;
    pub(super) const AXIS: u8 = 0x12;
}

/// A bit for each code, up to the last one.
fn bits(codes: &BTreeSet<u16>) -> Vec<u8> {
    let last = codes.last().copied().unwrap_or(0);
    let mut bits = vec![0; usize::from(last / 8) + 1];
    for code in codes {
        bits[usize::from(code / 8)] |= 1 << (code % 8);
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wheel() -> Description {
        Description {
            name: "a wheel".to_owned(),
            serial: "x".repeat(200),
            ids: [3, 0x1234, 5, 6],
            properties: BTreeSet::from([0]),
            codes: BTreeMap::from([
                (kind::KEY, BTreeSet::from([30, 0x110])),
                (kind::ABSOLUTE, BTreeSet::from([0])),
                (20, BTreeSet::from([0])),
            ]),
            axes: BTreeMap::from([(
                0,
                Axis {
                    minimum: -1,
                    maximum: 1023,
                    resolution: 7,
                    ..Axis::default()
                },
            )]),
        }
    }

    #[test]
    fn a_driver_reads_what_it_has_selected() {
        let wheel = wheel();
        let mut keys = vec![0; 35];
        (keys[3], keys[34]) = (1 << 6, 1);
        for (select, subselect, expected) in [
            (1, 0, b"a wheel".to_vec()),
            (2, 0, vec![b'x'; 128]),
            (3, 0, vec![3, 0, 0x34, 0x12, 5, 0, 6, 0]),
            (0x10, 0, vec![1]),
            (0x11, 1, keys),
            (0x11, 3, vec![1]),
            (
                0x12,
                0,
                [[255; 4], [255, 3, 0, 0], [0; 4], [0; 4], [7, 0, 0, 0]].concat(),
            ),
            // What it has not, and what is none of a driver's.
            (0x12, 1, Vec::new()),
            (0x11, 2, Vec::new()),
            (0x11, 20, Vec::new()),
            (0, 0, Vec::new()),
            (1, 1, Vec::new()),
            (0xff, 0xff, Vec::new()),
        ] {
            assert_eq!(
                wheel.answer(select, subselect),
                expected,
                "{select:#x} {subselect}"
            );
        }
        let has = |kind, code| {
            wheel.has(Event {
                kind,
                code,
                value: 1,
            })
        };
        assert!(has(1, 30) && has(3, 0));
        assert!(!has(1, 31) && !has(20, 0) && !has(0, 0));
        assert_eq!(wheel.keys().collect::<Vec<_>>(), [30, 0x110]);
    }
}
