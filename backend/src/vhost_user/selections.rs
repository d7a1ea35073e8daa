//! The configuration space of an input device answers what its driver has selected just before (virtio 1.3, 5.8.4): what a
//! back-end would answer is asked before there is a driver, since none waits for an answer.

use std::collections::VecDeque;

/// What is selected, and of it (`select`, `subsel`).
pub(super) type Selected = (u8, u8);

/// `enum virtio_input_config_select` (virtio 1.3, 5.8.4).
const ID_NAME: u8 = 0x01;
const ID_SERIAL: u8 = 0x02;
const ID_DEVIDS: u8 = 0x03;
const PROP_BITS: u8 = 0x10;
const EV_BITS: u8 = 0x11;
const ABS_INFO: u8 = 0x12;

/// `EV_…` (`linux/input-event-codes.h`): keys, relative and absolute axes, others, switches, lights, sounds, repetition.
const EVENTS: [u8; 8] = [0x01, 0x02, EV_ABS, 0x04, 0x05, 0x11, 0x12, 0x14];
const EV_ABS: u8 = 0x03;
/// Absolute axes that there are (`ABS_CNT`).
const AXES: u8 = 0x40;

/// Where the answer's size and the answer are, behind `select` and `subsel`.
const SIZE: usize = 2;
const ANSWER: usize = 8;
/// The longest answer.
const MAX_ANSWER: usize = 128;

/// What a back-end answers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selections {
    answers: Vec<(Selected, Vec<u8>)>,
}

impl Selections {
    /// The most bytes of [`Selections::encoded`]: a keyboard with all keys, and a device with all axes, have less.
    pub(super) const MAX_BYTES: usize = 4096;

    /// What is asked first.
    pub(super) fn first() -> VecDeque<Selected> {
        let whole = [ID_NAME, ID_SERIAL, ID_DEVIDS, PROP_BITS];
        let whole = whole.into_iter().map(|select| (select, 0));
        let events = EVENTS.into_iter().map(|kind| (EV_BITS, kind));
        whole.chain(events).collect()
    }

    /// Takes in the configuration space `space` that a back-end has shown for `selected`; what is to be asked for it.
    pub(super) fn take(&mut self, selected: Selected, space: &[u8]) -> Vec<Selected> {
        let size = space.get(SIZE).copied().unwrap_or(0).into();
        let answer = space.get(ANSWER..).unwrap_or(&[]);
        let answer = answer[..answer.len().min(size).min(MAX_ANSWER)].to_vec();
        if answer.is_empty() || self.bytes() + entry_bytes(&answer) > Self::MAX_BYTES {
            return Vec::new();
        }
        let axes = match selected {
            (EV_BITS, EV_ABS) => {
                let has = |axis: &u8| {
                    let byte = answer.get(usize::from(axis / 8)).copied();
                    byte.unwrap_or(0) & 1 << (axis % 8) != 0
                };
                (0..AXES).filter(has).map(|axis| (ABS_INFO, axis)).collect()
            }
            _ => Vec::new(),
        };
        self.answers.push((selected, answer));
        axes
    }

    /// What is answered for `selected`: nothing, if the device has not got it.
    pub(super) fn answer(&self, selected: Selected) -> &[u8] {
        let mut answers = self.answers.iter();
        let found = answers.find(|(other, _)| *other == selected);
        found.map_or(&[], |(_, answer)| answer)
    }

    /// Shows in `space` what is answered for what it selects.
    pub(super) fn show(&self, space: &mut [u8]) {
        let [select, subsel, rest @ ..] = space else {
            return;
        };
        let answer = self.answer((*select, *subsel));
        rest.fill(0);
        if let Some(size) = rest.first_mut() {
            *size = u8::try_from(answer.len()).expect("a short answer");
        }
        let to = rest.iter_mut().skip(ANSWER - SIZE);
        to.zip(answer).for_each(|(to, from)| *to = *from);
    }

    fn bytes(&self) -> usize {
        let answers = self.answers.iter();
        answers.map(|(_, answer)| entry_bytes(answer)).sum()
    }

    /// The answers, one behind the other: `select`, `subsel`, the size, the answer.
    pub(super) fn encoded(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes());
        for ((select, subsel), answer) in &self.answers {
            let size = u8::try_from(answer.len()).expect("a short answer");
            bytes.extend([*select, *subsel, size]);
            bytes.extend(answer);
        }
        bytes
    }

    /// Those that were encoded. What is no answer ends them.
    pub(super) fn decoded(mut bytes: &[u8]) -> Self {
        let mut answers = Vec::new();
        while let [select, subsel, size, rest @ ..] = bytes
            && let Some((answer, rest)) = rest.split_at_checked((*size).into())
            && answer.len() <= MAX_ANSWER
        {
            answers.push(((*select, *subsel), answer.to_vec()));
            bytes = rest;
        }
        Self { answers }
    }
}

fn entry_bytes(answer: &[u8]) -> usize {
    3 + answer.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(answer: &[u8]) -> Vec<u8> {
        let size = u8::try_from(answer.len()).unwrap();
        [&[0, 0, size, 0, 0, 0, 0, 0][..], answer].concat()
    }

    #[test]
    fn the_axes_that_there_are_are_asked_for() {
        let mut selections = Selections::default();
        assert_eq!(
            selections.take((EV_BITS, EV_ABS), &space(&[0b11, 0, 1])),
            [(ABS_INFO, 0), (ABS_INFO, 1), (ABS_INFO, 16)]
        );
        assert!(
            selections
                .take((EV_BITS, 1), &space(&[0xff; 96]))
                .is_empty()
        );
        assert!(selections.take((ABS_INFO, 0), &space(&[1; 20])).is_empty());
        assert!(selections.take((ID_SERIAL, 0), &space(&[])).is_empty());
        assert_eq!(selections.answer((EV_BITS, 1)), [0xff; 96]);
        assert!(selections.answer((ID_SERIAL, 0)).is_empty());
        let again = Selections::decoded(&selections.encoded());
        assert_eq!(again, selections);
        let mut shown = [9; 136];
        (shown[0], shown[1]) = (ABS_INFO, 0);
        again.show(&mut shown);
        assert_eq!(shown[2], 20);
        assert_eq!(shown[8..28], [1; 20]);
        assert_eq!(shown[28..], [0; 108]);
    }

    #[test]
    fn what_a_back_end_says_is_bounded() {
        let mut selections = Selections::default();
        // More than it shows, less than it says.
        assert!(
            selections
                .take((1, 0), &[1, 0, 200, 0, 0, 0, 0, 0, 5, 6])
                .is_empty()
        );
        assert_eq!(selections.answer((1, 0)), [5, 6]);
        for short in [&[][..], &[1], &[1, 0, 5], &[1, 0, 5, 0, 0, 0, 0, 0]] {
            selections.take((2, 0), short);
        }
        for axis in 0..=255 {
            selections.take((ABS_INFO, axis), &space(&[7; 128]));
        }
        let bytes = selections.encoded();
        assert!(bytes.len() <= Selections::MAX_BYTES && bytes.len() > Selections::MAX_BYTES - 200);
        for len in 0..bytes.len() {
            Selections::decoded(&bytes[..len]);
        }
        Selections::decoded(&[1, 0, 255]);
        Selections::decoded(&[1; 300]);
    }
}
