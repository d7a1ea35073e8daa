//! A slot without a device: the guest finds a place where one can be, and one may be attached while it runs.

use super::{Building, DeviceKind, NewDevice, Opened, Resources, Wanted};
use crate::devices::blk::Uses;
use anyhow::{Result, bail};
use serde_json::Value;
use xen_virtio_backend::DeviceType;

pub(super) struct EmptyKind;

impl DeviceKind for EmptyKind {
    fn device_type(&self) -> DeviceType {
        DeviceType::NONE
    }

    fn name(&self) -> &'static str {
        "empty"
    }

    fn driver_option(&self) -> Option<&'static str> {
        None
    }

    /// There is nothing to go on from.
    fn state_bytes(&self, _spec: &Value) -> usize {
        0
    }

    fn open(&self, _wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        Ok(Opened::new("an empty slot".to_owned(), Value::Null))
    }

    fn build(&self, _new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        bail!("an empty slot has no device");
    }
}
