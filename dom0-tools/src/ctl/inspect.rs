//! What `xen-virtioctl inspect` shows: all that is known of one device.

use crate::ctl::report::{EntryReport, GuestReport, Report, feature_names};
use std::fmt::{self, Display, Formatter};
use virtio_bindings::virtio_config as config;
use xen_virtio_transport::{DeviceReport, LatencyReport, QueueReport};

/// A device of a [`Report`].
pub struct Inspection<'a> {
    guest: &'a GuestReport,
    entry: &'a EntryReport,
}

/// Why there is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    #[error("{0}: xen-virtioctl list")]
    Guest(String),
    #[error("guest {guest} has no device {device}, but {has}")]
    Device {
        guest: String,
        device: String,
        has: String,
    },
}

impl<'a> Inspection<'a> {
    /// That of the `device` of `guest`, which goes by its name or domid.
    ///
    /// # Errors
    ///
    /// [`InspectError`] if there is none.
    pub fn of(report: &'a Report, guest: &str, device: &str) -> Result<Self, InspectError> {
        let known = report.find(guest).map_err(InspectError::Guest)?;
        let mut devices = known.devices.iter();
        let entry = devices.find(|entry| entry.key.to_string() == device);
        let entry = entry.ok_or_else(|| {
            let names = known.devices.iter().map(|entry| entry.key.to_string());
            InspectError::Device {
                guest: guest.to_owned(),
                device: device.to_owned(),
                has: names.collect::<Vec<_>>().join(", "),
            }
        })?;
        Ok(Self {
            guest: known,
            entry,
        })
    }
}

/// The bits of the status register (virtio 1.3, 2.1).
const STATUS: [(u32, &str); 6] = [
    (config::VIRTIO_CONFIG_S_ACKNOWLEDGE, "ACKNOWLEDGE"),
    (config::VIRTIO_CONFIG_S_DRIVER, "DRIVER"),
    (config::VIRTIO_CONFIG_S_FEATURES_OK, "FEATURES_OK"),
    (config::VIRTIO_CONFIG_S_DRIVER_OK, "DRIVER_OK"),
    (config::VIRTIO_CONFIG_S_NEEDS_RESET, "DEVICE_NEEDS_RESET"),
    (config::VIRTIO_CONFIG_S_FAILED, "FAILED"),
];

fn status_names(status: u32) -> String {
    let set = STATUS.iter().filter(|(bit, _)| status & bit != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

impl Display for Inspection<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { guest, entry } = self;
        let device = entry.device.as_ref();
        writeln!(
            f,
            "guest {} ({}), {}: {}",
            guest.name,
            guest.domid,
            entry.key,
            entry.kind_name()
        )?;
        line(f, "is", &entry.detail)?;
        line(f, "state", entry.state())?;
        if let Some(base) = entry.base {
            line(f, "page", format_args!("{base:#x}"))?;
        }
        match (guest.worker, &guest.error) {
            (Some(worker), _) => line(
                f,
                "worker",
                format_args!(
                    "process {worker}; others before it have died: {}",
                    guest.restarts
                ),
            )?,
            (None, _) => line(f, "worker", "none")?,
        }
        let texts = [&guest.error, &entry.error, &entry.hint];
        for text in texts.into_iter().flatten() {
            line(f, "wrong", text)?;
        }
        let Some(device) = device else {
            return Ok(());
        };
        let texts = [&device.failure, &device.misstep, &device.warning];
        for text in texts.into_iter().flatten() {
            line(f, "wrong", text)?;
        }
        write_registers(f, device)?;
        write_counts(f, device)
    }
}

fn write_registers(f: &mut Formatter<'_>, device: &DeviceReport) -> fmt::Result {
    let status = status_names(device.status);
    line(f, "status", format_args!("{:#x} {status}", device.status))?;
    let names = feature_names(device.device_type, device.features).join(" ");
    line(
        f,
        "features",
        format_args!("{:#x} {names}", device.features),
    )?;
    line(
        f,
        "queues",
        format_args!(
            "{}, set up by the driver: {}; requests under way: {}",
            device.queues, device.ready_queues, device.under_way
        ),
    )?;
    for queue in &device.running_queues {
        let QueueReport {
            index,
            size,
            descriptors,
            available,
            used,
            under_way,
        } = queue;
        line(
            f,
            &format!("queue {index}"),
            format_args!(
                "{size} entries: descriptors {descriptors:#x}, available {available:#x}, used {used:#x}; under way: {under_way}"
            ),
        )?;
    }
    line(
        f,
        "mapped",
        format_args!(
            "grants: {}, frames: {}; addresses refused: {}",
            device.grants_mapped, device.frames_mapped, device.refused_addresses
        ),
    )
}

fn write_counts(f: &mut Formatter<'_>, device: &DeviceReport) -> fmt::Result {
    line(
        f,
        "requests",
        format_args!(
            "{}, with an error: {}",
            device.requests, device.request_errors
        ),
    )?;
    line(
        f,
        "traps",
        format_args!(
            "{}, kicks among them: {}, without an effect: {}; interrupts: {}",
            device.traps, device.kicks, device.refused_accesses, device.interrupts
        ),
    )?;
    let registers = device.traps_by_register.iter();
    let registers = registers.map(|(register, count)| format!("{register} {count}"));
    line(f, "by register", registers.collect::<Vec<_>>().join(", "))?;
    line(
        f,
        "copied",
        format_args!(
            "{} bytes in {} segments of {} calls",
            device.copy_bytes, device.copy_segments, device.copy_batches
        ),
    )?;
    if let Some(latency) = latency(&device.latency) {
        line(f, "latency", latency)?;
    }
    let own = device.metrics.iter();
    let own = own.map(|(name, count)| format!("{name} {count}"));
    line(f, "its own", own.collect::<Vec<_>>().join(", "))
}

fn line(f: &mut Formatter<'_>, what: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "  {what:12} {text}")
}

/// How long the requests that were timed have taken; nothing, if none was.
pub(crate) fn latency(latency: &LatencyReport) -> Option<String> {
    let timed = latency.timed();
    if timed == 0 {
        return None;
    }
    let shares = [("half", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("all", 1.0)];
    let within = shares.map(|(name, share)| match latency.percentile_us(share) {
        Some(bound) => format!("{name} within {bound} µs"),
        None => format!("{name} not within 8 s"),
    });
    Some(format!("{}, of {timed} that were timed", within.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::report::sample;

    fn report() -> Report {
        let device = DeviceReport {
            device_type: 2,
            status: 0xf,
            features: 1 << 32 | 1 << 9,
            queues: 2,
            ready_queues: 1,
            requests: 99,
            traps: 7,
            under_way: 3,
            running_queues: vec![QueueReport {
                index: 0,
                size: 256,
                descriptors: 0x1000,
                available: 0x2000,
                used: 0x3000,
                under_way: 3,
            }],
            latency: LatencyReport {
                counts: vec![0, 8, 2, 0],
                total_ns: 0,
            },
            traps_by_register: [("QueueNotify".to_owned(), 5)].into(),
            metrics: [("reads".to_owned(), 90)].into(),
            warning: Some("waits for dom0".to_owned()),
            ..DeviceReport::default()
        };
        let mut report = sample::report(device);
        report.guests[0].restarts = 1;
        report.guests[0].devices[0].base = Some(0x200_0000);
        report
    }

    #[test]
    fn a_device_is_shown_whole() {
        let report = report();
        let text = Inspection::of(&report, "3", "virtio_disk/51712")
            .unwrap()
            .to_string();
        let expected = "\
guest ivi (3), virtio_disk/51712: blk
  is           /dev/vg/ivi, read-write
  state        running
  page         0x2000000
  worker       process 77; others before it have died: 1
  wrong        waits for dom0
  status       0xf ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK
  features     0x100000200 FLUSH VERSION_1
  queues       2, set up by the driver: 1; requests under way: 3
  queue 0      256 entries: descriptors 0x1000, available 0x2000, used 0x3000; under way: 3
  mapped       grants: 0, frames: 0; addresses refused: 0
  requests     99, with an error: 0
  traps        7, kicks among them: 0, without an effect: 0; interrupts: 0
  by register  QueueNotify 5
  copied       0 bytes in 0 segments of 0 calls
  latency      half within 2 µs, 90 % within 4 µs, 99 % within 4 µs, all within 4 µs, of 10 that were timed
  its own      reads 90
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_not_there_is_named_with_what_is() {
        let report = report();
        let error = |guest, device| {
            Inspection::of(&report, guest, device)
                .err()
                .unwrap()
                .to_string()
        };
        assert!(error("nav", "virtio/0").contains("no guest nav"));
        assert_eq!(
            error("ivi", "virtio/0"),
            "guest ivi has no device virtio/0, but virtio_disk/51712"
        );
    }
}
