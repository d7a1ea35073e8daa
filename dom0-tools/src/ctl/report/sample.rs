//! A report, for tests.

use super::{EntryReport, GuestReport, Report};
use crate::toolstack::libxl::{EntryForm, EntryKey};
use xen_virtio_backend::DeviceType;
use xen_virtio_transport::DeviceReport;

pub(crate) const DISK: EntryKey = EntryKey {
    form: EntryForm::Disk,
    devid: 51712,
};

/// That of the guest `ivi` (3) with one disk, of which its worker, 77, has said this, if it has.
pub(crate) fn report(device: impl Into<Option<DeviceReport>>) -> Report {
    let entry = EntryReport {
        key: DISK,
        device_type: Some(DeviceType::BLOCK.0),
        base: None,
        detail: "/dev/vg/ivi, read-write".to_owned(),
        error: None,
        busy: false,
        served: true,
        claimed_after_ms: None,
        hint: None,
        device: device.into(),
    };
    let guest = GuestReport {
        domid: 3,
        name: "ivi".to_owned(),
        worker: Some(77),
        restarts: 0,
        held: false,
        error: None,
        server: None,
        devices: vec![entry],
        closing: Vec::new(),
    };
    Report {
        guests: vec![guest],
        refusals: Vec::new(),
    }
}
