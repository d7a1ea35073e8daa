//! `xen-virtioctl attach` and `detach`: devices that come to a guest and go from it while it runs.

use crate::ctl::control::{self, AttachedAt, ControlError, Question};
use crate::ctl::report::{EntryReport, Report};
use crate::toolstack::libxl::{EntryForm, EntryKey};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER;

/// How often it is looked how far the supervisor is.
const LOOK: Duration = Duration::from_millis(50);

/// Gives `guest` the device of `line` in the empty slot `slot`, or the first, and waits `limit` at most until it is served. What
/// was done.
///
/// # Errors
///
/// What is wrong; the guest has no more than before.
pub fn attach(
    path: &Path,
    guest: &str,
    slot: Option<String>,
    line: String,
    limit: Duration,
) -> Result<String> {
    let question = Question::Attach {
        guest: guest.to_owned(),
        slot,
        line,
    };
    let AttachedAt { key, base } = control::order(path, &question)?;
    let mut waits_for = String::new();
    let served = until(limit, || {
        let Some(report) = list(path)? else {
            return Ok(None);
        };
        let Some(known) = report.of(guest) else {
            return Ok(None);
        };
        waits_for = known
            .error
            .iter()
            .map(|error| format!(": {error}"))
            .collect();
        let Some(device) = known.devices.iter().find(|device| device.key == key) else {
            return Ok(None);
        };
        match &device.error {
            Some(error) if device.busy => waits_for = format!(": {error}"),
            Some(error) => bail!("{error}"),
            None => {}
        }
        Ok(device.claimed_after_ms.map(|_| device.detail.clone()))
    });
    let limit_text = limit.as_secs();
    let served = served.and_then(|served| {
        served.with_context(|| format!("after {limit_text} s it is not served{waits_for}"))
    });
    match served {
        Ok(detail) => Ok(format!(
            "{key} at {base:#x}: {detail}\nIn the guest's Linux: echo {} > {DRIVER}/bind\n",
            linux_name(base)
        )),
        Err(error) => Err(match order_detach(path, guest, &key.to_string()) {
            Ok(key) => match wait_until_gone(path, guest, key, limit) {
                Ok(()) => error.context("nothing was attached"),
                Err(left) => error.context(format!("{left:#}")),
            },
            Err(left) => error.context(format!(
                "{key} may be attached still, and xen-virtioctl detach {guest} {key} takes it away ({left:#})"
            )),
        }),
    }
}

/// Takes from `guest` the device known as `device`, and waits `limit` at most until it is closed. One that a driver has is taken
/// by `force` only. What was done.
///
/// # Errors
///
/// Why it was not, or not yet.
pub fn detach(
    path: &Path,
    guest: &str,
    device_name: &str,
    force: bool,
    limit: Duration,
) -> Result<String> {
    // Without an answer nothing is known of its driver.
    let report = control::list(path)?;
    let found = report.of(guest).and_then(|known| {
        let mut devices = known.devices.iter();
        devices.find(|device| device.key.to_string() == device_name)
    });
    // Of another one the service says why it stays.
    let is_attached = |found: &&EntryReport| found.key.form == EntryForm::Attached;
    let found = found.filter(is_attached);
    let found = found.filter(|found| found.served && !force);
    if let Some(found) = found {
        let report = found.device.as_ref().with_context(|| {
            format!(
                "whether a driver has {device_name} its worker does not say: try again, or --force"
            )
        })?;
        ensure!(
            report.status & VIRTIO_CONFIG_S_DRIVER == 0,
            "a driver has {device_name}, and what it asks for would never end: first, in the guest's Linux, echo {} > \
             {DRIVER}/unbind; or --force",
            linux_name(found.base.unwrap_or_default())
        );
    }
    let key = order_detach(path, guest, device_name)?;
    wait_until_gone(path, guest, key, limit)?;
    Ok(format!("{key}: taken away\n"))
}

/// Has the device known as `device` be taken from `guest`.
fn order_detach(path: &Path, guest: &str, device: &str) -> Result<EntryKey, ControlError> {
    let question = Question::Detach {
        guest: guest.to_owned(),
        device: device.to_owned(),
    };
    control::order(path, &question)
}

/// Waits `limit` at most until `guest` has device `key` no more.
fn wait_until_gone(path: &Path, guest: &str, key: EntryKey, limit: Duration) -> Result<()> {
    let mut why = String::new();
    let gone = until(limit, || {
        let Some(report) = list(path)? else {
            return Ok(None);
        };
        let is_left = report.of(guest).is_some_and(|known| {
            why = match &known.error {
                Some(error) => format!("{key} is being taken away still: {error}"),
                None => format!("transfers of {key} are under way: it goes when they have ended"),
            };
            let closing = known.closing.iter().map(|closing| closing.key);
            let mut keys = known.devices.iter().map(|device| device.key).chain(closing);
            keys.any(|other| other == key)
        });
        Ok((!is_left).then_some(()))
    })?;
    gone.with_context(|| format!("after {} s {why}", limit.as_secs()))
}

/// Where Linux has its driver of these devices.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// What a guest's Linux calls a device whose page is there, by its node in the device tree.
fn linux_name(base: u64) -> String {
    format!("{base:x}.virtio")
}

/// What there is; nothing, while the service is replaced.
fn list(path: &Path) -> Result<Option<Report>, ControlError> {
    match control::list(path) {
        Ok(report) => Ok(Some(report)),
        Err(ControlError::Connect { .. } | ControlError::Connection(_)) => Ok(None),
        // It has ended before it answered.
        Err(ControlError::Answer(error)) if error.is_eof() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What `look` finds, if it finds something within `limit`.
fn until<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let end = Instant::now() + limit;
    loop {
        let found = look()?;
        if found.is_some() || Instant::now() >= end {
            return Ok(found);
        }
        std::thread::sleep(LOOK);
    }
}
