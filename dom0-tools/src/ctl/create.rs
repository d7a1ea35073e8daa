//! `xen-virtioctl create`, in the place of `xl create`: also with devices that xl has no words for, and the guest runs when they
//! are there.

use crate::config::{Config, VirtioConfig};
use crate::created::Created;
use crate::ctl::check;
use crate::ctl::control::{self, ControlError};
use crate::ctl::xl_config::{self, OwnLine};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A uuid that nothing has yet (random(4)).
const NEW_UUID: &str = "/proc/sys/kernel/random/uuid";

/// How often it is looked whether the devices are there.
const LOOK: Duration = Duration::from_millis(50);

/// What is to be said of a guest.
#[derive(Debug, PartialEq)]
struct Plan {
    name: String,
    /// The file's own, if it has one.
    uuid: Option<String>,
    /// What xl is told in place of the file's `virtio = [ … ]`.
    virtio: Vec<String>,
    devices: Vec<VirtioConfig>,
}

impl Plan {
    /// # Errors
    ///
    /// What is wrong in the xl file `text`, by its line.
    fn read(text: &[u8]) -> Result<Self, String> {
        let settings = xl_config::parse_file(text)?;
        let name = settings.text("name");
        let name = name.ok_or("the file has no name = \"…\"")?.to_owned();
        let texts = |key| xl_config::texts(&settings, key);
        let mut virtio: Vec<String> = texts("virtio")?.into_iter().map(str::to_owned).collect();
        let mut devices = Vec::new();
        for line in texts(xl_config::OWN_LIST)? {
            let device =
                OwnLine::parse(line).map_err(|problem| xl_config::of_line(text, line, &problem))?;
            devices.push(VirtioConfig {
                guest: name.clone(),
                index: u32::try_from(virtio.len()).map_err(|error| error.to_string())?,
                settings: device.settings.clone(),
            });
            virtio.push(device.xl_line());
        }
        Ok(Self {
            name,
            uuid: settings.text("uuid").map(str::to_owned),
            virtio,
            devices,
        })
    }

    /// For xl's command line.
    fn virtio_setting(&self) -> String {
        let lines: Vec<_> = self
            .virtio
            .iter()
            .map(|line| format!("\"{line}\""))
            .collect();
        format!("virtio=[{}]", lines.join(", "))
    }
}

/// Creates the guest of the xl file `file`, with `options` for xl, and lets it run once its devices are there, for which it
/// waits `limit` at most. What was done.
///
/// # Errors
///
/// What is wrong; there is no guest then.
pub fn create(
    file: &Path,
    options: &[OsString],
    config: &Config,
    created: &Created,
    limit: Duration,
) -> Result<String> {
    let text = std::fs::read(file).with_context(|| file.display().to_string())?;
    let findings = check::xl_file(file, config, &check::guest_files())?;
    let problems = findings.problems.join("\nerror: ");
    ensure!(
        problems.is_empty() || findings.is_without_devices(),
        "{}: {problems}\nno guest was created",
        file.display()
    );
    check_options(options)?;
    let plan = Plan::read(&text).map_err(anyhow::Error::msg)?;
    let old = xl_config::xen_version().and_then(xl_config::of_xl);
    if let Some(old) = old.filter(|_| !plan.virtio.is_empty()) {
        bail!("{old}\nno guest was created");
    }
    let count = findings.devices.len();
    if count > 0 {
        control::list(control::SOCKET_PATH.as_ref())?;
    }
    let name = plan.name.as_str();
    ensure!(
        xl(&["domid".into(), name.into()]).is_err(),
        "guest {name} is there already"
    );
    let uuid = match plan.uuid.clone() {
        Some(uuid) => uuid,
        None => std::fs::read_to_string(NEW_UUID)?.trim().to_owned(),
    };
    created.say(&uuid, name, &plan.devices)?;
    let made = start(file, options, &plan, &uuid, count, limit);
    made.inspect_err(|_| created.forget(&uuid))
}

/// What `create` says itself, or has to know beforehand, is not said by options of xl's.
fn check_options(options: &[OsString]) -> Result<()> {
    for option in options {
        let option = option.to_string_lossy();
        let key = option.split_once('=').map(|(key, _)| key.trim());
        let stays = ["-F", "-n", "-p"].contains(&option.as_ref());
        let stands_in_the_file = ["name", "uuid", "disk", "virtio", xl_config::OWN_LIST];
        ensure!(
            !stays && !key.is_some_and(|key| stands_in_the_file.contains(&key)),
            "{option} is not for xen-virtioctl create, which says it to xl itself or has it from the file\nno guest was created"
        );
    }
    Ok(())
}

/// Has xl create the guest, and lets it run once it has `count` devices.
fn start(
    file: &Path,
    options: &[OsString],
    plan: &Plan,
    uuid: &str,
    count: usize,
    limit: Duration,
) -> Result<String> {
    let mut arguments: Vec<OsString> = vec!["create".into(), "-q".into(), "-p".into()];
    arguments.push(file.into());
    if !plan.devices.is_empty() {
        arguments.push(plan.virtio_setting().into());
    }
    arguments.push(format!("uuid=\"{uuid}\"").into());
    arguments.extend_from_slice(options);
    xl(&arguments)?;
    let name = plan.name.as_str();
    let domid = xl(&["domid".into(), name.into()])?;
    let domid: u16 = domid.trim().parse().context("xl domid names no domain")?;
    let ready = match count {
        0 => Ok(String::new()),
        _ => wait(&domid.to_string(), count, limit),
    };
    let ready = ready.and_then(|text| {
        xl(&["unpause".into(), domid.to_string().into()])?;
        Ok(text)
    });
    ready.map_err(|error| {
        let destroyed = xl(&["destroy".into(), domid.to_string().into()]);
        match destroyed {
            Ok(_) => error.context(format!("guest {name} was destroyed again")),
            Err(left) => error.context(format!("guest {name} ({domid}) is left paused: {left:#}")),
        }
    })
}

/// Waits until the guest of that name or domid has at least `count` devices and all of them are served, for `limit` at most.
/// What they are.
///
/// # Errors
///
/// What it waits for still.
pub fn wait(guest: &str, count: usize, limit: Duration) -> Result<String> {
    let end = Instant::now() + limit;
    loop {
        let waits_for = match standing(guest, count)? {
            Ok(ready) => return Ok(ready),
            Err(waits_for) => waits_for,
        };
        if Instant::now() >= end {
            bail!("after {} s: {waits_for}", limit.as_secs());
        }
        std::thread::sleep(LOOK);
    }
}

/// What the guest's devices are, or what is waited for.
fn standing(guest: &str, count: usize) -> Result<Result<String, String>, ControlError> {
    let report = control::list(control::SOCKET_PATH.as_ref())?;
    let Some(known) = report.of(guest) else {
        return Ok(Err(format!(
            "guest {guest} has no virtio devices: is its xl older than 4.19?"
        )));
    };
    if let Some(error) = &known.error {
        return Ok(Err(error.clone()));
    }
    let mut text = String::new();
    let failed = known
        .devices
        .iter()
        .filter_map(|device| Some(format!("{}: {}", device.key, device.error.as_ref()?)));
    let failed: Vec<_> = failed.collect();
    if !failed.is_empty() {
        return Ok(Err(failed.join("\n")));
    }
    for device in &known.devices {
        let Some(after) = device.claimed_after_ms else {
            return Ok(Err(format!("{} is not served yet", device.key)));
        };
        text += &format!("{}: {}, after {after} ms\n", device.key, device.detail);
    }
    Ok(match known.devices.len() {
        0 => Err("it has no devices yet".to_owned()),
        have if have < count => Err(format!("it has {have} of {count} devices")),
        _ => Ok(text),
    })
}

/// What xl says.
fn xl(arguments: &[OsString]) -> Result<String> {
    let output = Command::new("xl").args(arguments).output().context("xl")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let what = arguments.first().map(|what| what.to_string_lossy());
        bail!("xl {}: {}", what.unwrap_or_default(), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xl_is_told_of_what_it_has_words_for() {
        let text = "name = 'g'\nvirtio = [ 'type=virtio,device4, transport=mmio' ]\nxen_virtio = [ 'fs, tag=share, \
                    socket=/run/g.sock',\n 'rng, bytes-per-second=7, grant_usage=0' ]\n";
        let plan = Plan::read(text.as_bytes()).unwrap();
        assert_eq!(
            plan.virtio_setting(),
            "virtio=[\"type=virtio,device4, transport=mmio\", \"type=virtio,device1a, transport=mmio, grant_usage=1\", \
             \"type=virtio,device4, transport=mmio, grant_usage=0\"]"
        );
        let indices: Vec<_> = plan.devices.iter().map(|device| device.index).collect();
        assert_eq!(indices, [1, 2]);
        assert_eq!(plan.devices[0].settings["tag"].as_str(), Some("share"));
    }

    #[test]
    fn an_option_that_says_otherwise_than_the_file_is_refused() {
        for option in ["-F", "-n", "-p", "name=\"x\"", "disk = []", "xen_virtio=[]"] {
            let error = check_options(&[option.into()]).unwrap_err().to_string();
            assert!(error.starts_with(option), "{error}");
        }
        check_options(&["-c".into(), "memory=256".into(), "extra=\"name=x\"".into()]).unwrap();
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let text = "name = 'g'\nxen_virtio = [\n'rng',\n'fs, tga=share, socket=/g' ]\n";
        let error = Plan::read(text.as_bytes()).unwrap_err();
        assert!(error.starts_with("line 4: "), "{error}");
        assert!(error.contains("unknown field `tga`"), "{error}");
        let error = Plan::read(b"xen_virtio = [ 'rng' ]\n").unwrap_err();
        assert!(error.contains("no name"), "{error}");
    }
}
