//! What `xen-virtioctl metrics` says of the service to a monitoring system, as OpenMetrics or as Prometheus had it before.

use crate::ctl::report::{EntryReport, GuestReport, Report};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::Arc;
use xen_virtio_transport::{DeviceReport, LatencyReport};

/// How it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' text format 0.0.4, which other tools read.
    Prometheus,
}

impl Format {
    /// What an answer in it is called (OpenMetrics 1.0, "Overall Structure").
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// `report` in this format.
///
/// # Errors
///
/// None but those of a text that cannot be written.
pub fn encode(report: Report, format: Format) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("xen_virtio");
    registry.register_collector(Box::new(Reported(Arc::new(report))));
    let mut text = String::new();
    match format {
        Format::OpenMetrics => text::encode(&mut text, &registry)?,
        Format::Prometheus => prometheus_text::encode(&mut text, &registry)?,
    }
    Ok(text)
}

#[derive(Debug)]
struct Reported(Arc<Report>);

/// Characters of a guest's name: one that chooses its own (init-dom0less) is not to fill every line with it.
const MAX_NAME: usize = 128;

type Labels<'a> = Vec<(&'static str, String)>;

/// A number of each device.
struct OfDevice {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    value: fn(&DeviceReport) -> u64,
}

const COUNTER: MetricType = MetricType::Counter;
const GAUGE: MetricType = MetricType::Gauge;

const OF_DEVICES: [OfDevice; 12] = [
    number(
        COUNTER,
        "device_requests",
        "Requests that were carried out",
        |device| device.requests,
    ),
    number(
        COUNTER,
        "device_request_errors",
        "Requests that ended with an error",
        |device| device.request_errors,
    ),
    number(
        COUNTER,
        "device_traps",
        "Register accesses of the guest",
        |device| device.traps,
    ),
    number(
        COUNTER,
        "device_kicks",
        "Notifications of queues among them",
        |device| device.kicks,
    ),
    number(
        COUNTER,
        "device_interrupts",
        "Interrupts that were raised",
        |device| device.interrupts,
    ),
    number(
        COUNTER,
        "device_copy_calls",
        "Calls that copied by grant",
        |device| device.copy_batches,
    ),
    number(
        COUNTER,
        "device_copied_bytes",
        "Bytes that were copied by grant",
        |device| device.copy_bytes,
    ),
    number(
        COUNTER,
        "device_refused_addresses",
        "Addresses of the guest that were refused",
        |device| device.refused_addresses,
    ),
    number(
        COUNTER,
        "device_refused_accesses",
        "Register accesses without an effect",
        |device| device.refused_accesses,
    ),
    number(
        GAUGE,
        "device_mapped_grants",
        "Granted pages that are mapped",
        |device| device.grants_mapped,
    ),
    number(
        GAUGE,
        "device_mapped_frames",
        "Foreign frames that are mapped",
        |device| device.frames_mapped,
    ),
    number(
        GAUGE,
        "device_requests_under_way",
        "Requests that the device has taken and not given back",
        |device| device.under_way,
    ),
];

const fn number(
    kind: MetricType,
    name: &'static str,
    help: &'static str,
    value: fn(&DeviceReport) -> u64,
) -> OfDevice {
    OfDevice {
        name,
        help,
        kind,
        value,
    }
}

impl Collector for Reported {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_guests(&mut encoder)?;
        let help = "Whether the device is served: 0 if it is not, has failed, or was given up by its driver";
        let mut family = encoder.encode_descriptor("device_good", help, None, GAUGE)?;
        for (guest, entry) in self.0.devices() {
            let is_good = entry.is_served();
            encode_number(
                &mut family,
                GAUGE,
                &labels(guest, entry),
                u64::from(is_good),
            )?;
        }
        for OfDevice {
            name,
            help,
            kind,
            value,
        } in OF_DEVICES
        {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (guest, entry, device) in self.devices() {
                encode_number(&mut family, kind, &labels(guest, entry), value(device))?;
            }
        }
        let help = "What devices of its kind count besides, by the counter's name";
        let mut family = encoder.encode_descriptor("device_counts", help, None, COUNTER)?;
        for (guest, entry, device) in self.devices() {
            for (name, value) in &device.metrics {
                let mut labels = labels(guest, entry);
                labels.push(("counter", name.clone()));
                encode_number(&mut family, COUNTER, &labels, *value)?;
            }
        }
        self.encode_latencies(&mut encoder)
    }
}

impl Reported {
    /// Those of which their worker has told something.
    fn devices(&self) -> impl Iterator<Item = (&GuestReport, &EntryReport, &DeviceReport)> {
        let entries = self.0.devices();
        entries.filter_map(|(guest, entry)| Some((guest, entry, entry.device.as_ref()?)))
    }

    fn encode_guests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let of = guest_labels;
        let help = "Whether a worker serves the guest";
        let mut family = encoder.encode_descriptor("guest_served", help, None, GAUGE)?;
        for guest in &self.0.guests {
            let is_served = guest.worker.is_some() && guest.error.is_none();
            encode_number(&mut family, GAUGE, &of(guest), u64::from(is_served))?;
        }
        let help = "Workers of the guest that have died";
        let mut family = encoder.encode_descriptor("worker_restarts", help, None, COUNTER)?;
        for guest in &self.0.guests {
            encode_number(&mut family, COUNTER, &of(guest), guest.restarts)?;
        }
        let servers = || {
            self.0
                .guests
                .iter()
                .filter_map(|guest| Some((guest, guest.server.as_ref()?)))
        };
        let help = "Processor time of the guest's worker";
        let mut family =
            encoder.encode_descriptor("worker_cpu", help, Some(&Unit::Seconds), COUNTER)?;
        for (guest, server) in servers() {
            let seconds = server.cpu_ns as f64 / 1e9;
            let labels = of(guest);
            let mut metric = family.encode_family(&labels)?;
            metric.encode_counter::<Labels<'_>, _, f64>(&seconds, None)?;
        }
        let help = "How often the worker had nothing to do, and then something again";
        let mut family = encoder.encode_descriptor("worker_sleeps", help, None, COUNTER)?;
        for (guest, server) in servers() {
            encode_number(&mut family, COUNTER, &of(guest), server.sleeps)?;
        }
        let help = "System calls of the worker";
        let mut family = encoder.encode_descriptor("worker_system_calls", help, None, COUNTER)?;
        for (guest, server) in servers() {
            encode_number(&mut family, COUNTER, &of(guest), server.syscalls)?;
        }
        Ok(())
    }

    fn encode_latencies(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "How long requests were with the device, of which a few are timed";
        let mut family = encoder.encode_descriptor(
            "request_latency",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (guest, entry, device) in self.devices() {
            let LatencyReport { counts, total_ns } = &device.latency;
            if counts.is_empty() {
                continue;
            }
            let last = counts.len() - 1;
            let buckets: Vec<_> = counts
                .iter()
                .enumerate()
                .map(|(place, count)| match place == last {
                    true => (f64::INFINITY, *count),
                    false => (LatencyReport::bound_us(place) as f64 / 1e6, *count),
                })
                .collect();
            let labels = labels(guest, entry);
            let mut metric = family.encode_family(&labels)?;
            let sum = *total_ns as f64 / 1e9;
            metric.encode_histogram::<Labels<'_>>(sum, device.latency.timed(), &buckets, None)?;
        }
        Ok(())
    }
}

fn guest_labels(guest: &GuestReport) -> Labels<'static> {
    let name = guest.name.chars().take(MAX_NAME).collect();
    vec![("domid", guest.domid.to_string()), ("guest", name)]
}

fn labels(guest: &GuestReport, entry: &EntryReport) -> Labels<'static> {
    let mut labels = guest_labels(guest);
    labels.extend([
        ("device", entry.key.to_string()),
        ("type", entry.kind_name()),
    ]);
    labels
}

fn encode_number(
    family: &mut MetricEncoder<'_>,
    kind: MetricType,
    labels: &Labels<'_>,
    value: u64,
) -> fmt::Result {
    let mut metric = family.encode_family(labels)?;
    match kind {
        MetricType::Counter => metric.encode_counter::<Labels<'_>, _, u64>(&value, None),
        _ => metric.encode_gauge(&value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::report::sample;
    use crate::worker::event_loop::EventLoopReport;

    #[test]
    fn a_guest_and_its_device_are_told_of() {
        let device = DeviceReport {
            device_type: 2,
            requests: 99,
            grants_mapped: 14,
            latency: LatencyReport {
                counts: vec![0, 8, 2, 1],
                total_ns: 30_000_000,
            },
            metrics: [("reads".to_owned(), 90)].into(),
            failure: Some("a loop".to_owned()),
            ..DeviceReport::default()
        };
        let mut report = sample::report(device);
        let guest = &mut report.guests[0];
        // What a label cannot have as it is.
        guest.name = "i\"v\ni".to_owned();
        guest.restarts = 2;
        guest.server = Some(EventLoopReport {
            cpu_ns: 1_500_000_000,
            ..EventLoopReport::default()
        });
        let text = encode(report.clone(), Format::OpenMetrics).unwrap();
        let guest = r#"domid="3",guest="i\"v\ni""#;
        let device = format!(r#"{guest},device="virtio_disk/51712",type="blk""#);
        for expected in [
            format!("xen_virtio_guest_served{{{guest}}} 1\n"),
            format!("xen_virtio_worker_restarts_total{{{guest}}} 2\n"),
            format!("xen_virtio_worker_cpu_seconds_total{{{guest}}} 1.5\n"),
            format!("xen_virtio_device_good{{{device}}} 0\n"),
            format!("xen_virtio_device_requests_total{{{device}}} 99\n"),
            format!("xen_virtio_device_mapped_grants{{{device}}} 14\n"),
            format!("xen_virtio_device_counts_total{{{device},counter=\"reads\"}} 90\n"),
            format!("xen_virtio_request_latency_seconds_count{{{device}}} 11\n"),
            format!("xen_virtio_request_latency_seconds_bucket{{le=\"0.000004\",{device}}} 10\n"),
            format!("xen_virtio_request_latency_seconds_bucket{{le=\"+Inf\",{device}}} 11\n"),
        ] {
            assert!(text.contains(&expected), "{expected}{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        // There a counter is what it is called, and nothing ends it.
        let text = encode(report, Format::Prometheus).unwrap();
        let help = "# HELP xen_virtio_worker_restarts_total ";
        assert!(text.contains(help) && !text.contains("# EOF"), "{text}");
    }

    #[test]
    fn a_name_fills_no_more_than_its_place_and_an_empty_slot_is_good() {
        let mut report = sample::report(None);
        report.guests[0].name = "ä".repeat(4096);
        let slot = &mut report.guests[0].devices[0];
        slot.device_type = Some(0);
        slot.claimed_after_ms = Some(1);
        let text = encode(report, Format::OpenMetrics).unwrap();
        let name = "ä".repeat(MAX_NAME);
        let expected = format!("xen_virtio_device_good{{domid=\"3\",guest=\"{name}\",");
        let line = text.lines().find(|line| line.starts_with(&expected));
        assert!(line.is_some_and(|line| line.ends_with(" 1")), "{text}");
    }

    #[test]
    fn nothing_is_told_of_nobody() {
        let text = encode(Report::default(), Format::OpenMetrics).unwrap();
        assert!(text.ends_with("# EOF\n") && !text.contains('{'), "{text}");
    }
}
