//! Entropy: what dom0's kernel has of it, at a limited rate.

use super::{
    Building, Built, DeviceKind, NewDevice, Opened, Resources, Wanted, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state;
use anyhow::Result;
use serde::Deserialize;
use std::num::NonZeroU64;
use xen_virtio_backend::rng::Rng;
use xen_virtio_backend::{DeviceType, OneByOne};

/// Bytes a second without a setting: enough to seed a guest at once, and a few percent of a processor if it reads on.
const RATE: u64 = 16 << 10;

pub(super) struct RngKind;

/// What a `[[virtio]]` says of one.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Settings {
    bytes_per_second: Option<NonZeroU64>,
}

impl DeviceKind for RngKind {
    fn device_type(&self) -> DeviceType {
        Rng::DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_HW_RANDOM_VIRTIO")
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<Settings>(settings).map(drop)
    }

    fn state_bytes(&self, _spec: &serde_json::Value) -> usize {
        guest_state::device_bytes(&[], &[Rng::QUEUE_SIZE])
    }

    fn open(&self, wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        let settings: Settings = wanted.settings()?.unwrap_or_default();
        let rate = settings.bytes_per_second.map_or(RATE, NonZeroU64::get);
        Ok(Opened::new(
            format!("entropy, at most {rate} bytes a second"),
            spec(&rate),
        ))
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        Ok(Building::Ready(Built {
            device: Box::new(OneByOne::new(Rng::new(serde_json::from_value(new.spec)?)?)),
            control: None,
            known: None,
        }))
    }
}
