//! What the back-ends of a device are known to have, beyond its worker.

use crate::guest_state::DeviceRecords;
use anyhow::Result;
use xen_virtio_backend::StateCell;
use xen_virtio_backend::vhost_user::{MAX_CONFIG, MAX_QUEUES, Offer};

/// The record of a device: what its back-ends are known to have, see [`encoded`].
const OFFER: u16 = 0;
/// Bytes of that: features, queues, and the configuration space.
pub(super) const OFFER_BYTES: usize = 8 + 2 + MAX_CONFIG;

pub(super) fn record(records: &DeviceRecords<'_>) -> Result<StateCell> {
    let area = records.own(OFFER, StateCell::bytes(OFFER_BYTES))?;
    Ok(StateCell::new(area))
}

pub(super) fn store(record: &StateCell, offer: &Offer) {
    let stored = record.store(&encoded(offer));
    stored.expect("room for the longest configuration space");
}

fn encoded(offer: &Offer) -> Vec<u8> {
    let Offer {
        features,
        queues,
        config,
    } = offer;
    let config = &config[..config.len().min(MAX_CONFIG)];
    [&features.to_le_bytes()[..], &queues.to_le_bytes(), config].concat()
}

/// What was encoded, if anything was.
pub(super) fn decoded(bytes: &[u8]) -> Option<Offer> {
    let (features, rest) = bytes.split_first_chunk()?;
    let (queues, config) = rest.split_first_chunk()?;
    let queues = u16::from_le_bytes(*queues);
    (1..=MAX_QUEUES).contains(&queues).then(|| Offer {
        features: u64::from_le_bytes(*features),
        queues,
        config: config.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_virtio_backend::StateArea;

    #[test]
    fn what_a_back_end_has_is_kept() {
        let area = StateArea::private(StateCell::bytes(OFFER_BYTES)).unwrap();
        let record = StateCell::new(area);
        assert_eq!(decoded(&record.load().unwrap()), None);
        for len in [0, 1, 60, MAX_CONFIG] {
            let offer = Offer {
                features: 1 << 63 | 5,
                queues: MAX_QUEUES,
                config: (0..len)
                    .map(|byte| u8::try_from(byte % 251).unwrap())
                    .collect(),
            };
            store(&record, &offer);
            assert_eq!(decoded(&record.load().unwrap()), Some(offer));
        }
    }
}
