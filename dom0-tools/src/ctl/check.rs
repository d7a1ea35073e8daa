//! `xen-virtioctl check`: what is wrong with the devices of guests that may not be there yet.

use crate::config::Config;
use crate::ctl::xl_config::{self, Findings, Planned};
use crate::toolstack::guest_file::{self, GuestFileError, GuestFiles};
use anyhow::{Context, Result};
use std::path::Path;

/// The files of guests on this host.
pub fn guest_files() -> GuestFiles {
    GuestFiles::new(guest_file::DIRECTORY.as_ref())
}

/// What is wrong with the guest of the xl file at `path`: with the devices that the file has, or with those of the guest's own
/// file, if it has no other.
///
/// # Errors
///
/// What keeps a file from being read.
pub fn xl_file(path: &Path, config: &Config, files: &GuestFiles) -> Result<Findings> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let mut findings = xl_config::check(&text, config);
    if findings.is_without_devices()
        && let Some(name) = xl_config::name(&text)
    {
        let own = guest_file(files, &name)?;
        if !own.devices.is_empty() {
            findings = own;
            let warnings = xl_config::warnings_of_guest_file(&text);
            findings.warnings.extend(warnings);
        }
    }
    Ok(findings)
}

/// What is wrong with the devices of the guest `name`, by its own file.
///
/// # Errors
///
/// What keeps it from being used.
pub fn guest_file(files: &GuestFiles, name: &str) -> Result<Findings, GuestFileError> {
    let path = format!("{}/{name}.toml", guest_file::DIRECTORY);
    let mut findings = Findings::default();
    for (device, index) in files.devices(name)?.iter().zip(0..) {
        let about = |text: &dyn std::fmt::Display| format!("{path}, virtio_file/{index}: {text}");
        let warnings = device.warnings();
        findings.good.push(about(&device));
        findings
            .warnings
            .extend(warnings.iter().map(|warning| about(warning)));
        findings.devices.push(Planned {
            name: format!("virtio_file/{index}"),
            kind: device.kind_name(),
            settings: device.settings.clone(),
            grants: device.grant_usage,
        });
    }
    Ok(findings)
}
