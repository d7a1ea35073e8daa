//! `xen-virtioctl report`: a page about the running service.

use anyhow::{Context, Result};
use rustix::system::uname;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::ctl::control;
use xen_virtio_dom0_tools::ctl::page::{Story, page};
use xen_virtio_dom0_tools::ctl::rates;
use xen_virtio_dom0_tools::ctl::stats::Stats;
use xen_virtio_dom0_tools::doctor::{self, About};

const PERIOD: Duration = Duration::from_secs(1);

/// Looks on for `seconds`, and writes what was seen to `html`, or says it.
///
/// # Errors
///
/// What keeps it from being seen or written.
pub(crate) fn run(html: Option<&Path>, seconds: u64) -> Result<String> {
    let mut report = control::list(control::SOCKET_PATH.as_ref())?;
    let mut answered = Instant::now();
    let mut all = Vec::new();
    for _ in 0..seconds {
        sleep(PERIOD.saturating_sub(answered.elapsed()));
        let next = control::list(control::SOCKET_PATH.as_ref())?;
        all.push(rates::between(&report, &next, answered.elapsed()));
        (report, answered) = (next, Instant::now());
    }
    let diagnosis = doctor::diagnose(About::Everyone)?;
    let Some(path) = html else {
        return Ok(format!("{diagnosis}\n{report}\n{}", Stats(&report)));
    };
    let story = Story {
        about: about(),
        diagnosis,
        period: PERIOD,
        rates: all,
        report,
    };
    fs::write(path, page(&story)).with_context(|| format!("writing {}", path.display()))?;
    Ok(format!("{} is written\n", path.display()))
}

/// Where and when it is.
fn about() -> Vec<(&'static str, String)> {
    let system = uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let version = ["major", "minor", "extra"].map(|name| {
        let text = fs::read_to_string(Path::new("/sys/hypervisor/version").join(name));
        text.unwrap_or_default().trim().to_owned()
    });
    let [major, minor, extra] = version;
    let date = Command::new("date").output();
    let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    vec![
        ("Host", text(system.nodename())),
        ("When", date.unwrap_or_default()),
        ("Xen", format!("{major}.{minor}{extra}")),
        ("dom0's Linux", text(system.release())),
        ("xen-virtioctl", env!("CARGO_PKG_VERSION").to_owned()),
    ]
}
