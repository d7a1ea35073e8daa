//! What `xen-virtioctl report` writes: a page about a running service that can be mailed, without a script or anything else to
//! fetch.

use crate::ctl::inspect::latency;
use crate::ctl::rates::{DeviceRates, Rates};
use crate::ctl::report::{EntryReport, GuestReport, Report};
use crate::ctl::stats::Stats;
use crate::doctor::{Diagnosis, Finding, Severity};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::fmt::Write;
use std::time::Duration;
use xen_virtio_transport::LatencyReport;

/// What it is made of.
#[derive(Debug)]
pub struct Story {
    /// What is known of where and when, by name.
    pub about: Vec<(&'static str, String)>,
    pub diagnosis: Diagnosis,
    /// What was done in each period of so long.
    pub period: Duration,
    pub rates: Vec<Vec<DeviceRates>>,
    /// The last of what the service has said.
    pub report: Report,
}

const STYLE: &str = "
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2530; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #d5dce4 }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e6eaee; vertical-align: top }
th { font-weight: 600; background: #f4f6f8 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; font-size: 12px }
.fault { color: #a3231f; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 } .fine { color: #23723a; font-weight: 600 }
dt { float: left; clear: left; width: 9rem; color: #57636f } dd { margin-left: 9.5rem }
svg { display: block } svg rect { fill: #3b78b5 } svg polyline { fill: none; stroke: #3b78b5; stroke-width: 1.5 } svg text { font-size: 9px; fill: #57636f }
";

/// The page.
pub fn page(story: &Story) -> String {
    let title = "Virtio devices of Xen guests";
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                dl { @for (name, text) in &story.about { dt { (name) } dd { (text) } } }
                (findings(&story.diagnosis))
                h2 { "Devices" }
                (devices(story))
                h2 { "How long requests took" }
                (latencies(&story.report))
                h2 { "What a request costs" }
                pre { (Stats(&story.report)) }
            }
        }
    };
    markup.into_string()
}

fn findings(diagnosis: &Diagnosis) -> Markup {
    html! {
        h2 { "What doctor finds" }
        @if diagnosis.findings.is_empty() {
            p.fine { "Nothing is wrong: " (diagnosis.fine.len()) " things were looked at." }
        } @else {
            table {
                tr { th { "" } th { "about" } th { "what" } th { "why it matters" } th { "remedy" } }
                @for Finding { severity, subject, what, why, remedy } in &diagnosis.findings {
                    tr {
                        @match severity {
                            Severity::Fault => td.fault { "fault" },
                            Severity::Warning => td.warning { "warning" },
                        }
                        td { (subject) } td { (what) } td { (why) } td { (remedy) }
                    }
                }
            }
            p { (diagnosis.fine.len()) " other things were looked at, and are fine." }
        }
    }
}

fn devices(story: &Story) -> Markup {
    let last = story.rates.last();
    html! {
        table {
            tr {
                th { "guest" } th { "device" } th { "is" } th { "state" } th.n { "requests" } th.n { "errors" }
                th { "requests a second, over " (story.period.as_secs_f64() * story.rates.len() as f64) " s" }
            }
            @for (guest, entry) in story.report.devices() {
                tr {
                    td { (guest.name) " (" (guest.domid) ")" }
                    td { (entry.key) " " (entry.kind_name()) }
                    td { (entry.detail) }
                    td class=(if entry.is_served() { "" } else { "fault" }) {
                        (entry.state())
                        @if let Some(error) = &entry.error { ": " (error) }
                    }
                    @if let Some(device) = &entry.device {
                        td.n { (device.requests) } td.n { (device.request_errors) }
                    } @else { td.n {} td.n {} }
                    td {
                        (course(&requests(story, guest, entry)))
                        @if let Some(rates) = last.and_then(|rates| of(rates, guest, entry)) {
                            (format!("{:.0} requests, {:.0} KiB a second", rates.requests, rates.bytes / 1024.0))
                        }
                    }
                }
            }
        }
    }
}

fn of<'a>(rates: &'a [DeviceRates], guest: &GuestReport, entry: &EntryReport) -> Option<&'a Rates> {
    let name = entry.key.to_string();
    let mut rates = rates.iter();
    let found = rates.find(|rates| rates.domid == guest.domid && rates.device == name);
    found.and_then(|found| found.rates.as_ref())
}

/// Requests a second, period by period; those of which nothing is known are left out.
fn requests(story: &Story, guest: &GuestReport, entry: &EntryReport) -> Vec<f64> {
    let periods = story.rates.iter();
    let known = periods.filter_map(|rates| of(rates, guest, entry));
    known.map(|rates| rates.requests).collect()
}

const WIDTH: f64 = 220.0;
const HEIGHT: f64 = 34.0;

/// How `values` went, in a line.
fn course(values: &[f64]) -> Markup {
    let most = values.iter().copied().fold(1.0, f64::max);
    let step = WIDTH / (values.len().max(2) - 1) as f64;
    let points = values
        .iter()
        .enumerate()
        .fold(String::new(), |mut text, (place, value)| {
            let y = HEIGHT - 2.0 - value / most * (HEIGHT - 4.0);
            // To a text, which takes all.
            let _ = write!(text, "{:.1},{y:.1} ", place as f64 * step);
            text
        });
    html! {
        @if values.len() > 1 {
            svg width=(WIDTH) height=(HEIGHT) role="img" { polyline points=(points.trim_end()) {} }
        }
    }
}

fn latencies(report: &Report) -> Markup {
    let timed = report.devices().filter_map(|(guest, entry)| {
        let device = entry.device.as_ref()?;
        Some((guest, entry, &device.latency, latency(&device.latency)?))
    });
    let timed: Vec<_> = timed.collect();
    html! {
        @if timed.is_empty() { p { "None was timed." } }
        @for (guest, entry, report, text) in timed {
            p { b { (guest.name) ", " (entry.key) } ": " (text) }
            (histogram(report))
        }
    }
}

/// Bars from the first count that there is to the last.
fn histogram(latency: &LatencyReport) -> Markup {
    const BAR: usize = 44;
    const TALL: f64 = 60.0;
    let there = |place: &usize| latency.counts[*place] > 0;
    let places = 0..latency.counts.len();
    let (first, last) = (places.clone().find(there), places.rev().find(there));
    let shown: Vec<usize> = first
        .zip(last)
        .map_or_else(Vec::new, |(first, last)| (first..=last).collect());
    let most = shown
        .iter()
        .map(|place| latency.counts[*place])
        .max()
        .unwrap_or(1) as f64;
    html! {
        svg width=(BAR * shown.len().max(1)) height=(TALL + 26.0) role="img" {
            @for (index, place) in shown.iter().enumerate() {
                @let count = latency.counts[*place];
                @let tall = count as f64 / most * TALL;
                rect x=(index * BAR + 2) y=(format!("{:.1}", TALL + 12.0 - tall)) width=(BAR - 4) height=(format!("{tall:.1}")) {
                    title { (count) }
                }
                text x=(index * BAR + 3) y=(TALL + 23.0) { (bound(latency, *place)) }
            }
        }
    }
}

fn bound(latency: &LatencyReport, place: usize) -> String {
    let us = LatencyReport::bound_us(place);
    match us {
        _ if place + 1 == latency.counts.len() => "more".to_owned(),
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{} s", us / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::rates::between;
    use crate::ctl::report::sample;
    use std::fs;
    use std::path::Path;
    use std::process::Command;
    use xen_virtio_transport::DeviceReport;

    fn report(requests: u64) -> Report {
        let mut report = sample::report(DeviceReport {
            device_type: 2,
            status: 0xf,
            requests,
            latency: LatencyReport {
                counts: vec![0, 8, 0, 4, 0, 1],
                total_ns: 0,
            },
            ..DeviceReport::default()
        });
        report.guests[0].name = "<script>alert(1)</script>".to_owned();
        report
    }

    fn story() -> Story {
        let period = Duration::from_secs(1);
        let reports = [0, 100, 300].map(report);
        Story {
            about: vec![("Xen", "4.20.4".to_owned())],
            diagnosis: Diagnosis::default(),
            period,
            rates: reports
                .windows(2)
                .map(|pair| between(&pair[0], &pair[1], period))
                .collect(),
            report: reports[2].clone(),
        }
    }

    #[test]
    fn a_page_has_all_and_believes_nobody() {
        let page = page(&story());
        for expected in [
            "<!DOCTYPE html>",
            "Nothing is wrong",
            "<dd>4.20.4</dd>",
            "&lt;script&gt;alert(1)&lt;/script&gt; (3)",
            "virtio_disk/51712 blk",
            "<polyline points=\"0.0,17.0 220.0,2.0\">",
            "200 requests, 0 KiB a second",
            "half within 2 µs",
            ">2 µs</text>",
            ">more</text>",
            "requests a second, over 2 s",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
        // It stands alone.
        for outside in ["<script", "http", "src=", "href="] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<rect").count(), 5);
    }

    /// Its words, as they stand when it is printed, and without a complaint.
    #[test]
    #[ignore = "it needs Chromium and pdftotext: scripts/browser"]
    fn a_browser_shows_the_page() {
        let folder = tempfile::tempdir().unwrap();
        let [html, pdf, profile] =
            ["page.html", "page.pdf", "profile"].map(|name| folder.path().join(name));
        fs::write(&html, page(&story())).unwrap();
        let browser = Command::new("chromium")
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
            ])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(format!("--print-to-pdf={}", pdf.display()))
            .arg(&html)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&browser.stderr);
        assert!(browser.status.success(), "{said}");
        assert!(!said.contains("CONSOLE"), "{said}");
        let read = Command::new("pdftotext")
            .args([&pdf, Path::new("-")])
            .output()
            .unwrap();
        let shown = String::from_utf8(read.stdout).unwrap();
        let shown: Vec<_> = shown.split_whitespace().collect();
        let shown = shown.join(" ");
        for expected in [
            "Nothing is wrong",
            "Xen 4.20.4",
            "virtio_disk/51712 blk",
            "requests a second, over 2 s",
            "200 requests, 0 KiB a second",
            "<script>alert(1)</script>, virtio_disk/51712: half within 2 µs",
            "more",
        ] {
            assert!(shown.contains(expected), "{expected}: {shown}");
        }
    }

    #[test]
    fn findings_stand_with_what_to_do() {
        let mut story = story();
        let finding = serde_json::json!({
            "severity": "fault", "subject": "gntdev", "what": "is not there", "why": "no guest", "remedy": "modprobe & more",
        });
        story
            .diagnosis
            .findings
            .push(serde_json::from_value(finding).unwrap());
        story.rates.clear();
        story.report = Report::default();
        let page = page(&story);
        for expected in [
            "<td class=\"fault\">fault</td>",
            "modprobe &amp; more",
            "None was timed",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
    }
}
