//! What has happened between two reports.

use crate::ctl::report::{GuestReport, Report};
use std::time::Duration;
use xen_virtio_transport::{DeviceReport, LatencyReport};

/// The counters of bytes that a guest has had moved, whatever the device.
const BYTES: [&str; 7] = [
    "read_bytes",
    "written_bytes",
    "sent_bytes",
    "received_bytes",
    "output_bytes",
    "input_bytes",
    "entropy_bytes",
];

/// What a device has done.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceRates {
    pub domid: u16,
    pub guest: String,
    /// As `list` names it.
    pub device: String,
    pub kind: String,
    pub state: &'static str,
    /// The worker's process.
    pub worker: Option<u32>,
    /// Of the guest's worker, of one processor.
    pub cpu_percent: Option<f64>,
    /// None of a device of which the same worker has not told twice.
    pub rates: Option<Rates>,
}

/// For each second, where nothing else is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    pub requests: f64,
    pub bytes: f64,
    /// µs that half of the requests, and 99 of 100, have not exceeded.
    pub half_us: Option<u64>,
    pub most_us: Option<u64>,
    /// For each request.
    pub traps: f64,
    pub interrupts: f64,
    /// Pages of the guest that are mapped now.
    pub mapped: u64,
    /// Requests that are with the device now.
    pub under_way: u64,
}

/// In place of µs that nothing bounds.
pub const BEYOND: u64 = u64::MAX;

/// What every device of `later` has done since `earlier`, which was so long before.
pub fn between(earlier: &Report, later: &Report, time: Duration) -> Vec<DeviceRates> {
    let seconds = time.as_secs_f64();
    let mut all = Vec::new();
    for guest in &later.guests {
        // Counts begin anew with each worker.
        let mut guests = earlier.guests.iter();
        let before =
            guests.find(|known| known.domid == guest.domid && known.worker == guest.worker);
        let cpu_percent = before.and_then(|before| cpu_percent(before, guest, seconds));
        for entry in &guest.devices {
            let known =
                before.and_then(|known| known.devices.iter().find(|other| other.key == entry.key));
            let reports = known.and_then(|known| known.device.as_ref());
            let reports = reports.zip(entry.device.as_ref());
            all.push(DeviceRates {
                domid: guest.domid,
                guest: guest.name.clone(),
                device: entry.key.to_string(),
                kind: entry.kind_name(),
                state: entry.state(),
                worker: guest.worker,
                cpu_percent,
                rates: reports.map(|(earlier, later)| rates(earlier, later, seconds)),
            });
        }
    }
    all
}

fn cpu_percent(earlier: &GuestReport, later: &GuestReport, seconds: f64) -> Option<f64> {
    let (earlier, later) = (earlier.server.as_ref()?, later.server.as_ref()?);
    let used = later.cpu_ns.saturating_sub(earlier.cpu_ns);
    Some(used as f64 / 1e7 / seconds)
}

fn rates(earlier: &DeviceReport, later: &DeviceReport, seconds: f64) -> Rates {
    let count = |of: fn(&DeviceReport) -> u64| of(later).saturating_sub(of(earlier)) as f64;
    let requests = count(|device| device.requests);
    let each = |count: f64| match requests > 0.0 {
        true => count / requests,
        false => 0.0,
    };
    let latency = latency_between(&earlier.latency, &later.latency);
    Rates {
        requests: requests / seconds,
        bytes: count(bytes) / seconds,
        half_us: bound(&latency, 0.5),
        most_us: bound(&latency, 0.99),
        traps: each(count(|device| device.traps)),
        interrupts: each(count(|device| device.interrupts)),
        mapped: later.mapped(),
        under_way: later.under_way,
    }
}

fn bytes(device: &DeviceReport) -> u64 {
    let counts = BYTES.iter().filter_map(|name| device.metrics.get(*name));
    counts.fold(0, |sum, count| sum.saturating_add(*count))
}

/// As [`LatencyReport::percentile_us`]; beyond all bounds is [`BEYOND`].
fn bound(latency: &LatencyReport, share: f64) -> Option<u64> {
    let was_timed = latency.timed() > 0;
    was_timed.then(|| latency.percentile_us(share).unwrap_or(BEYOND))
}

fn latency_between(earlier: &LatencyReport, later: &LatencyReport) -> LatencyReport {
    let counts = later.counts.iter().enumerate();
    let counts = counts.map(|(place, count)| {
        let before = earlier.counts.get(place).copied().unwrap_or(0);
        count.saturating_sub(before)
    });
    LatencyReport {
        counts: counts.collect(),
        total_ns: later.total_ns.saturating_sub(earlier.total_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::report::sample;
    use crate::worker::event_loop::EventLoopReport;

    fn report(requests: u64, counts: &[u64], cpu_ns: u64) -> Report {
        let device = DeviceReport {
            device_type: 2,
            status: 0xf,
            requests,
            traps: 2 * requests,
            grants_mapped: 6,
            latency: LatencyReport {
                counts: counts.to_vec(),
                total_ns: 0,
            },
            metrics: [
                ("read_bytes".to_owned(), 4096 * requests),
                ("submissions".to_owned(), 7),
            ]
            .into(),
            ..DeviceReport::default()
        };
        let mut report = sample::report(device);
        report.guests[0].server = Some(EventLoopReport {
            cpu_ns,
            ..EventLoopReport::default()
        });
        report
    }

    #[test]
    fn what_has_happened_is_told_for_each_second() {
        let (earlier, later) = (
            report(100, &[9, 0, 0], 0),
            report(300, &[9, 10, 0], 500_000_000),
        );
        let all = between(&earlier, &later, Duration::from_secs(2));
        let [device] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(
            (device.device.as_str(), device.kind.as_str()),
            ("virtio_disk/51712", "blk")
        );
        let expected = Rates {
            requests: 100.0,
            bytes: 409_600.0,
            half_us: Some(2),
            most_us: Some(2),
            traps: 2.0,
            interrupts: 0.0,
            mapped: 6,
            under_way: 0,
        };
        assert_eq!(device.cpu_percent, Some(25.0));
        assert_eq!(device.rates.as_ref(), Some(&expected));
    }

    #[test]
    fn nothing_is_told_of_what_was_not_reported_twice_by_one_worker() {
        let (earlier, mut later) = (report(100, &[9], 0), report(110, &[10], 0));
        let rates = |earlier: &Report, later: &Report| {
            let all = between(earlier, later, Duration::from_secs(1));
            (all[0].rates.is_some(), all[0].cpu_percent.is_some())
        };
        assert_eq!(rates(&earlier, &later), (true, true));
        assert_eq!(rates(&Report::default(), &later), (false, false));
        later.guests[0].worker = Some(8);
        assert_eq!(rates(&earlier, &later), (false, false));
        // A worker that was too busy to answer.
        later.guests[0].worker = Some(77);
        later.guests[0].server = None;
        later.guests[0].devices[0].device = None;
        assert_eq!(rates(&earlier, &later), (false, false));
        assert_eq!(rates(&later, &earlier), (false, false));
    }

    #[test]
    fn times_beyond_all_bounds_are_not_taken_for_none() {
        let all = between(
            &report(0, &[0, 0], 0),
            &report(9, &[0, 4], 0),
            Duration::from_secs(1),
        );
        let rates = all[0].rates.as_ref().unwrap();
        assert_eq!((rates.half_us, rates.traps), (Some(BEYOND), 2.0));
    }
}
