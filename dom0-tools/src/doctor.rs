//! `xen-virtioctl doctor`: what keeps guests from their virtio devices, why that matters, and what to do.
//!
//! What is so (of the host, a report, an xl file) is gathered apart from what follows from it, which are pure functions.

mod findings;
mod guest_kernel;
mod guests;
mod host;
mod host_findings;
mod remedies;
mod xl_file;

use crate::config::Config;
use crate::ctl::control::{self, ControlError};
use anyhow::{Result, ensure};
pub use findings::{Diagnosis, Finding, Fine, Severity};
use host::Host;
use std::path::Path;

/// What a doctor is asked about, besides the host and its service.
#[derive(Clone, Copy, Debug)]
pub enum About<'a> {
    /// All guests that have a device.
    Everyone,
    /// One of them, by its name or domid.
    Guest(&'a str),
    /// A guest that may not be there yet, by its xl file.
    File(&'a Path),
}

impl<'a> About<'a> {
    /// What somebody means by `word`: a file that is there, or else a guest.
    pub fn new(word: Option<&'a str>) -> Self {
        match word {
            None => Self::Everyone,
            Some(word) if word.contains('/') || Path::new(word).is_file() => {
                Self::File(Path::new(word))
            }
            Some(word) => Self::Guest(word),
        }
    }
}

/// Looks at this host, at its service that listens at [`control::SOCKET_PATH`], and at what is asked `about`.
///
/// # Errors
///
/// If this process may not look.
pub fn diagnose(about: About<'_>) -> Result<Diagnosis> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "only root may look at xenstore, at Xen's devices and at the service: sudo xen-virtioctl doctor"
    );
    let mut diagnosis = Diagnosis::default();
    let report = control::list(control::SOCKET_PATH.as_ref());
    let guests = report.iter().flat_map(|report| &report.guests);
    let host = Host::look(&guests.map(|guest| guest.domid).collect::<Vec<_>>());
    host_findings::judge(&host, &mut diagnosis);
    match &report {
        // What nobody listens to was found at the host.
        Err(ControlError::Connect { .. }) | Ok(_) => {}
        Err(error) => diagnosis.find(host_findings::service_is_silent(error)),
    }
    match (about, &report) {
        (About::File(path), _) => {
            let config = Config::load_default().unwrap_or_default();
            xl_file::judge(path, &config, &mut diagnosis);
        }
        (About::Guest(name), Ok(report)) => guests::judge_one(report, name, &mut diagnosis),
        (About::Everyone, Ok(report)) => guests::judge_all(report, &mut diagnosis),
        (About::Guest(_) | About::Everyone, Err(_)) => {}
    }
    Ok(diagnosis)
}
