//! What a guest may do in a second.

use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use xen_virtio_backend::Limits;

/// [`Limits`], as one part of the service hands them to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Rate {
    pub(crate) bytes: Option<NonZeroU64>,
    pub(crate) operations: Option<NonZeroU64>,
    pub(crate) burst_seconds: u32,
}

impl From<Rate> for Limits {
    fn from(rate: Rate) -> Self {
        let Rate {
            bytes,
            operations,
            burst_seconds,
        } = rate;
        Self {
            bytes,
            operations,
            burst_seconds,
        }
    }
}
