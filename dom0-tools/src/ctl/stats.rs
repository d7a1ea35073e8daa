//! What `xen-virtioctl stats` shows: what a request costs.

use crate::ctl::inspect::latency;
use crate::ctl::report::{EntryReport, GuestReport, Report, write_table};
use std::fmt::{self, Display, Formatter};
use xen_virtio_transport::{DeviceReport, LatencyReport};

/// The counts of a [`Report`], each divided by the device's requests.
pub struct Stats<'a>(pub &'a Report);

const HEADER: [&str; 11] = [
    "DOMID",
    "DEVICE",
    "REQUESTS",
    "TRAPS",
    "KICKS",
    "INTERRUPTS",
    "COPIES",
    "SEGMENTS",
    "BYTES",
    "SUBMITS",
    "µs: COPY IN / DISK / COPY OUT",
];

impl Display for Stats<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut rows = vec![HEADER.map(str::to_owned)];
        for guest in &self.0.guests {
            rows.extend(guest.devices.iter().filter_map(|entry| row(guest, entry)));
        }
        if rows.len() == 1 {
            return writeln!(
                f,
                "No device has done a request yet; xen-virtioctl list shows how they are."
            );
        }
        writeln!(f, "A request, on average since its device was attached:\n")?;
        write_table(f, &rows)?;
        for guest in &self.0.guests {
            write_guest(f, guest)?;
        }
        Ok(())
    }
}

fn row(guest: &GuestReport, entry: &EntryReport) -> Option<[String; 11]> {
    let device = entry.device.as_ref().filter(|device| device.requests > 0)?;
    let each = |count| format!("{:.3}", each(count, device));
    // Nothing has been timed yet: only one call in a while is.
    let microseconds = |count| match count {
        0 => "-".to_owned(),
        _ => format!("{:.1}", self::each(count, device) / 1000.0),
    };
    // Not every kind of device counts them.
    let counted = |name: &str| device.metrics.get(name).copied();
    let none = || "-".to_owned();
    Some([
        guest.domid.to_string(),
        entry.key.to_string(),
        device.requests.to_string(),
        each(device.traps),
        each(device.kicks),
        each(device.interrupts),
        each(device.copy_batches),
        each(device.copy_segments),
        format!("{:.0}", self::each(device.copy_bytes, device)),
        counted("submissions").map_or_else(none, each),
        ["copy_in_ns", "submit_ns", "copy_out_ns"]
            .map(|stage| counted(stage).map_or_else(none, microseconds))
            .join(" / "),
    ])
}

fn each(count: u64, device: &DeviceReport) -> f64 {
    count as f64 / device.requests as f64
}

/// What concerns all devices of a guest, and which registers were trapped.
fn write_guest(f: &mut Formatter<'_>, guest: &GuestReport) -> fmt::Result {
    let GuestReport { name, domid, .. } = guest;
    let devices = || {
        guest
            .devices
            .iter()
            .filter_map(|entry| entry.device.as_ref())
    };
    let requests: u64 = devices().map(|device| device.requests).sum();
    let Some(server) = guest.server.as_ref().filter(|_| requests > 0) else {
        return Ok(());
    };
    let each = |count: u64, unit: f64| count as f64 / unit / requests as f64;
    writeln!(
        f,
        "\nguest {name} ({domid}), a request: {:.3} sleeps, {:.3} changes of task, {:.3} system calls, {:.3} of them yields, \
         {:.1} µs of processor time, {:.1} µs of them looking for work",
        each(server.sleeps, 1.0),
        each(server.task_switches, 1.0),
        each(server.syscalls, 1.0),
        each(server.yields, 1.0),
        each(server.cpu_ns, 1e3),
        each(server.polled_ns, 1e3),
    )?;
    for entry in &guest.devices {
        let Some(device) = &entry.device else {
            continue;
        };
        let traps: Vec<String> = device
            .traps_by_register
            .iter()
            .map(|(register, count)| format!("{register} {count}"))
            .collect();
        writeln!(f, "{} traps: {}", entry.key, traps.join(", "))?;
        if let Some(latency) = latency(&device.latency) {
            writeln!(f, "{} latency: {latency}", entry.key)?;
            writeln!(f, "{} µs: {}", entry.key, histogram(&device.latency))?;
        }
    }
    Ok(())
}

/// How many requests took up to so many µs, and longer than half of that.
fn histogram(latency: &LatencyReport) -> String {
    let last = latency.counts.len() - 1;
    let counts = latency.counts.iter().enumerate();
    let there = counts.filter(|(_, count)| **count > 0);
    let shown = there.map(|(place, count)| match place == last {
        true => format!("more: {count}"),
        false => format!("{}: {count}", LatencyReport::bound_us(place)),
    });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::report::sample;
    use crate::worker::event_loop::EventLoopReport;

    fn report(requests: u64) -> Report {
        let device = DeviceReport {
            requests,
            kicks: 5,
            copy_batches: 40,
            metrics: [("copy_in_ns".to_owned(), 100_000)].into(),
            latency: LatencyReport {
                counts: vec![0, 8, 0, 2],
                total_ns: 0,
            },
            traps_by_register: [("QueueNotify".to_owned(), 5)].into(),
            ..DeviceReport::default()
        };
        let mut report = sample::report(device);
        report.guests[0].server = Some(EventLoopReport {
            sleeps: 10,
            polled_ns: 20_000,
            cpu_ns: 1_000_000,
            syscalls: 70,
            yields: 4,
            task_switches: 30,
        });
        report
    }

    #[test]
    fn counts_are_shown_a_request() {
        let text = Stats(&report(20)).to_string();
        for expected in [
            "0.250",
            "2.000",
            "5.0 / - / -",
            "0.500 sleeps, 1.500 changes of task, 3.500 system calls, 0.200 of them yields, 50.0 µs of processor time, 1.0 µs",
            "virtio_disk/51712 traps: QueueNotify 5",
            "virtio_disk/51712 latency: half within 2 µs, 90 % not within 8 s",
            "virtio_disk/51712 µs: 2: 8, more: 2",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn a_device_without_requests_divides_nothing() {
        let text = Stats(&report(0)).to_string();
        assert!(text.contains("No device has done a request yet"), "{text}");
    }
}
