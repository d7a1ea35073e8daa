//! `xen-virtioctl doctor`: what keeps guests from their virtio devices, why that matters, and what to do.
//!
//! What is so ([`Host`], [`Report`], an xl file) is gathered apart from what follows from it, which are pure functions.

mod findings;
mod guest_kernel;
mod guests;
mod host;
mod host_findings;
mod remedies;
mod xl_file;

use crate::config::Config;
use crate::ctl::control;
use crate::ctl::report::Report;
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
pub fn diagnose(about: About<'_>) -> Diagnosis {
    let mut diagnosis = Diagnosis::default();
    if !rustix::process::geteuid().is_root() {
        diagnosis.find(host_findings::not_root());
        return diagnosis;
    }
    let host = Host::look();
    host_findings::judge(&host, &mut diagnosis);
    match about {
        About::File(path) => {
            let config = Config::load_default().unwrap_or_default();
            xl_file::judge(path, &config, &mut diagnosis);
        }
        About::Everyone | About::Guest(_) => {
            // That it does not answer was found already.
            if let Ok(report) = control::list(control::SOCKET_PATH.as_ref()) {
                judge_guests(&report, about, &mut diagnosis);
            }
        }
    }
    diagnosis
}

fn judge_guests(report: &Report, about: About<'_>, diagnosis: &mut Diagnosis) {
    match about {
        About::Guest(name) => guests::judge_one(report, name, diagnosis),
        About::Everyone | About::File(_) => guests::judge_all(report, diagnosis),
    }
}
