//! What devices were known to be in an earlier life of their guest's: xl restarts a guest that reboots without waiting for
//! anybody, and its uuid is the same.

use crate::toolstack::libxl::EntryKey;
use serde_json::Value;
use std::collections::VecDeque;

/// Devices that are remembered; then the one that was noted first is forgotten.
const MOST: usize = 256;

/// Bytes that are remembered of a device, as text: more than any configuration space takes.
const MOST_BYTES: usize = 32 << 10;

#[derive(Default)]
pub(super) struct KnownDevices(VecDeque<(String, EntryKey, Value)>);

impl KnownDevices {
    /// Device `key` of the guest of this uuid is known to be `known`. A guest without one has no other life.
    pub(super) fn note(&mut self, uuid: &str, key: EntryKey, known: Value) {
        if uuid.is_empty() || known.to_string().len() > MOST_BYTES {
            return;
        }
        self.0
            .retain(|(other, device, _)| other != uuid || *device != key);
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back((uuid.to_owned(), key, known));
    }

    pub(super) fn of(&self, uuid: &str, key: EntryKey) -> Option<Value> {
        let mut devices = self.0.iter();
        let found = devices.find(|(other, device, _)| other == uuid && *device == key);
        found.map(|(_, _, known)| known.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;

    fn key(devid: u32) -> EntryKey {
        EntryKey {
            form: EntryForm::Virtio,
            devid,
        }
    }

    #[test]
    fn the_newest_of_each_device_is_known() {
        let mut known = KnownDevices::default();
        known.note("a", key(0), 1.into());
        known.note("a", key(1), 2.into());
        known.note("b", key(0), 3.into());
        known.note("a", key(0), 4.into());
        known.note("", key(0), 5.into());
        assert_eq!(known.of("a", key(0)), Some(4.into()));
        assert_eq!(known.of("a", key(1)), Some(2.into()));
        assert_eq!(known.of("b", key(0)), Some(3.into()));
        assert_eq!(known.of("b", key(1)), None);
        assert_eq!(known.of("", key(0)), None);
    }

    #[test]
    fn what_guests_can_have_noted_is_bounded() {
        let mut known = KnownDevices::default();
        for guest in 0..=MOST {
            known.note(&guest.to_string(), key(0), Value::Null);
        }
        assert_eq!(known.0.len(), MOST);
        assert_eq!(known.of("0", key(0)), None);
        assert_eq!(known.of("1", key(0)), Some(Value::Null));
        known.note("1", key(1), "x".repeat(MOST_BYTES).into());
        assert_eq!(known.of("1", key(1)), None);
    }
}
