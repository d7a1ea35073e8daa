//! What of a device outlives its worker: what its back-ends are known to have, and what its driver has written.

use crate::guest_state::DeviceRecords;
use anyhow::Result;
use xen_virtio_backend::shadow::ShadowRecord;
use xen_virtio_backend::vhost_user::{Class, Keep, Lasting, MAX_QUEUES, Offer};
use xen_virtio_backend::{StateArea, StateCell};

/// The records of a device: what its back-ends are known to have, see [`encoded`], and what its driver has written to the
/// configuration space.
const OFFER: u16 = 0;
const WRITTEN: u16 = 1;
/// … and what is with its back-end.
const SHADOWS: u16 = 2;
/// Bytes of what a driver may write.
const WRITTEN_BYTES: usize = 8;

/// Bytes of what a back-end has: features, queues, and what is known of the configuration space.
const fn offer_bytes(class: &Class) -> usize {
    8 + 2 + class.known_bytes()
}

/// What is kept of a device.
#[derive(Clone)]
pub(super) struct Kept {
    offer: StateCell,
    written: StateCell,
    shadows: StateArea,
    /// What was stored last as the offer, or is known of it.
    known: Offer,
    class: &'static Class,
}

impl Kept {
    /// Bytes of the records of a device of `class`.
    pub(super) const fn bytes(class: &Class) -> [usize; 3] {
        [
            StateCell::bytes(offer_bytes(class)),
            StateCell::bytes(WRITTEN_BYTES),
            MAX_QUEUES as usize * ShadowRecord::bytes(class.queue_size),
        ]
    }

    pub(super) fn new(records: &DeviceRecords<'_>, class: &'static Class) -> Result<Self> {
        let [offer, written, shadows] = Self::bytes(class);
        Ok(Self {
            offer: StateCell::new(records.own(OFFER, offer)?),
            written: StateCell::new(records.own(WRITTEN, written)?),
            shadows: records.own(SHADOWS, shadows)?,
            known: Offer::default(),
            class,
        })
    }

    /// What of the device goes beyond this process.
    pub(super) fn lasting(self) -> Result<Lasting> {
        let bytes = ShadowRecord::bytes(self.class.queue_size);
        let record = |queue: u16| {
            let area = self.shadows.part(usize::from(queue) * bytes, bytes);
            ShadowRecord::new(area)
        };
        Ok(Lasting {
            written: self.written.load()?,
            records: (0..MAX_QUEUES).map(record).collect(),
            keep: Box::new(self),
        })
    }

    /// What the back-ends are known to have, if that is known.
    pub(super) fn offer(&self) -> Result<Option<Offer>> {
        Ok(decoded(&self.offer.load()?, self.class))
    }

    pub(super) fn store(&mut self, offer: &Offer) {
        self.known = offer.clone();
        self.put(offer);
    }

    fn put(&self, offer: &Offer) {
        let stored = self.offer.store(&encoded(offer));
        stored.expect("room for the longest configuration space");
    }
}

impl Keep for Kept {
    fn back_ends(&self, config: &[u8]) {
        self.put(&Offer {
            config: config.to_vec(),
            ..self.known.clone()
        });
    }

    fn drivers(&self, written: &[u8]) {
        let stored = self.written.store(written);
        stored.expect("room for what a driver may write");
    }
}

pub(super) fn encoded(offer: &Offer) -> Vec<u8> {
    let Offer {
        features,
        queues,
        config,
    } = offer;
    [&features.to_le_bytes()[..], &queues.to_le_bytes(), config].concat()
}

/// What was encoded of a device of `class`, if anything was: a worker that its guest has taken over may say anything.
pub(super) fn decoded(bytes: &[u8], class: &Class) -> Option<Offer> {
    let (features, rest) = bytes.split_first_chunk()?;
    let (queues, config) = rest.split_first_chunk()?;
    let queues = u16::from_le_bytes(*queues);
    let has_room = config.len() <= class.known_bytes();
    let is_offer = has_room && (1..=MAX_QUEUES).contains(&queues);
    is_offer.then(|| Offer {
        features: u64::from_le_bytes(*features),
        queues,
        config: config.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_virtio_backend::vhost_user::CLASSES;

    #[test]
    fn what_a_back_end_has_and_a_driver_writes_is_kept() {
        for class in CLASSES {
            let areas = Kept::bytes(class).map(|bytes| StateArea::private(bytes).unwrap());
            let [offer, written, shadows] = areas;
            let [offer, written] = [offer, written].map(StateCell::new);
            let mut kept = Kept {
                offer,
                written,
                shadows,
                known: Offer::default(),
                class,
            };
            assert_eq!(kept.offer().unwrap(), None);
            assert!(class.writable.len() <= WRITTEN_BYTES);
            let mut offer = Offer {
                features: 1 << 63 | 5,
                queues: MAX_QUEUES,
                config: vec![7; class.known_bytes()],
            };
            kept.store(&offer);
            assert_eq!(kept.offer().unwrap(), Some(offer.clone()));
            offer.config.fill(8);
            kept.back_ends(&offer.config);
            assert_eq!(kept.offer().unwrap(), Some(offer));
            let longer = Offer {
                config: vec![9; class.known_bytes() + 1],
                ..kept.known.clone()
            };
            assert_eq!(decoded(&encoded(&longer), class), None);
            kept.drivers(&[1, 2]);
            let lasting = kept.clone().lasting().unwrap();
            assert_eq!(lasting.written, [1, 2]);
            assert_eq!(lasting.records.len(), usize::from(MAX_QUEUES));
            kept.drivers(&[]);
            assert!(kept.lasting().unwrap().written.is_empty());
        }
    }
}
