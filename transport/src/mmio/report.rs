//! What is told of a device, in plain numbers.

use crate::virtio_state::QueueSetup;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use xen_virtio_backend::QueueIndex;

/// What [`MmioDevice::report`](super::MmioDevice::report) tells of a device, in plain numbers, for `xen-virtioctl`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub device_type: u32,
    /// The status register (virtio 1.3, 2.1).
    pub status: u32,
    pub features: u64,
    pub queues: usize,
    pub ready_queues: usize,
    pub grants_mapped: u64,
    pub frames_mapped: u64,
    pub refused_addresses: u64,
    pub copy_batches: u64,
    pub copy_segments: u64,
    pub copy_bytes: u64,
    pub requests: u64,
    pub request_errors: u64,
    pub traps: u64,
    /// The traps by register; the configuration space is one.
    pub traps_by_register: BTreeMap<String, u64>,
    pub refused_accesses: u64,
    pub kicks: u64,
    pub interrupts: u64,
    /// How long requests have taken, of which a few are timed.
    #[serde(default)]
    pub latency: LatencyReport,
    /// Requests that are with the device.
    #[serde(default)]
    pub under_way: u64,
    /// The queues that run as far as the driver knows, the first [`DeviceReport::SHOWN_QUEUES`] of them.
    #[serde(default)]
    pub running_queues: Vec<QueueReport>,
    /// What a device of its kind counts besides, by name ([`Device::metrics`](xen_virtio_backend::Device::metrics)).
    #[serde(default)]
    pub metrics: BTreeMap<String, u64>,
    /// Why the device needs a reset, until it gets one.
    pub failure: Option<String>,
    /// What kept the driver from getting on, by its own doing.
    #[serde(default)]
    pub misstep: Option<String>,
    /// What whoever looks after the device should know, though it works.
    #[serde(default)]
    pub warning: Option<String>,
}

impl DeviceReport {
    /// The most queues that are shown: the reports of all devices of a guest are one message.
    pub const SHOWN_QUEUES: usize = 8;

    /// Pages of the guest that are mapped.
    pub fn mapped(&self) -> u64 {
        self.grants_mapped.saturating_add(self.frames_mapped)
    }
}

/// The requests that were timed. Of a power of two of them, counts are the requests that took up to 1, 2, 4 … µs; the last is of all
/// that took longer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyReport {
    pub counts: Vec<u64>,
    /// Nanoseconds of all of them.
    pub total_ns: u64,
}

impl LatencyReport {
    /// How many there are.
    pub fn timed(&self) -> u64 {
        let counts = self.counts.iter();
        counts.fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The µs that requests counted at `place` have not exceeded.
    pub fn bound_us(place: usize) -> u64 {
        let bits = u32::try_from(place).unwrap_or(u32::MAX);
        1_u64.checked_shl(bits).unwrap_or(u64::MAX)
    }

    /// The µs that `share` of the requests, from 0 to 1, have not exceeded: the bound of their count. None if none was timed, or
    /// if it is beyond all bounds.
    pub fn percentile_us(&self, share: f64) -> Option<u64> {
        let timed = self.timed();
        let mut rest = (timed as f64 * share).ceil();
        let bounds = self.counts.len().checked_sub(1)?;
        for (place, count) in self.counts[..bounds].iter().enumerate() {
            rest -= *count as f64;
            if rest <= 0.0 && timed > 0 {
                return Some(Self::bound_us(place));
            }
        }
        None
    }
}

/// A queue, as its driver has set it up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueReport {
    pub index: usize,
    pub size: u16,
    /// Where its areas are: addresses of the guest, or of what it has granted.
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// Requests that the device has taken and not given back.
    pub under_way: u64,
}

impl QueueReport {
    pub(super) fn of((index, setup, under_way): (QueueIndex, QueueSetup, u64)) -> Self {
        let layout = setup.layout;
        Self {
            index: index.get(),
            size: layout.size,
            descriptors: layout.descriptors.0,
            available: layout.available.0,
            used: layout.used.0,
            under_way,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_bound_that_so_many_have_not_exceeded() {
        let report = |counts: &[u64]| LatencyReport {
            counts: counts.to_vec(),
            total_ns: 0,
        };
        for (counts, share, expected) in [
            (&[][..], 0.5, None),
            (&[0, 0, 0], 0.5, None),
            (&[1, 0, 0], 0.5, Some(1)),
            (&[50, 49, 1, 0], 0.5, Some(1)),
            (&[50, 49, 1, 0], 0.99, Some(2)),
            (&[50, 49, 1, 0], 1.0, Some(4)),
            (&[0, 1, 1], 0.5, Some(2)),
            (&[0, 1, 1], 0.99, None),
        ] {
            assert_eq!(
                report(counts).percentile_us(share),
                expected,
                "{counts:?}, {share}"
            );
        }
    }
}
