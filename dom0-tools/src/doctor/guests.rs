//! What follows from what the service says of its guests.

use super::findings::{Diagnosis, Finding};
use super::remedies::Advice;
use crate::ctl::report::{EntryReport, GuestReport, Refusal, Report, feature_names};
use virtio_bindings::virtio_config as config;
use xen_virtio_transport::DeviceReport;

/// Judges every guest that has a device, or was given up for want of one.
pub(super) fn judge_all(report: &Report, to: &mut Diagnosis) {
    for guest in &report.guests {
        judge(guest, to);
    }
    for refusal in &report.refusals {
        judge_refusal(refusal, to);
    }
    if report.guests.is_empty() && report.refusals.is_empty() {
        to.fine("guests", "none has a virtio device");
    }
}

/// Judges the guest `name`, or that domid.
pub(super) fn judge_one(report: &Report, name: &str, to: &mut Diagnosis) {
    let guest = report.find(name);
    if let Ok(guest) = guest {
        judge(guest, to);
    }
    let refusals = report.refusals.iter();
    let refusals =
        refusals.filter(|refusal| refusal.guest == name || refusal.domid.to_string() == name);
    let mut was_refused = false;
    // What was refused to an earlier guest of that name may have been mended since.
    for refusal in refusals.filter(|_| guest.is_err()) {
        was_refused = true;
        judge_refusal(refusal, to);
    }
    if let Err(error) = guest
        && !was_refused
    {
        to.find(Finding::fault(
            format!("guest {name}"),
            error,
            "nothing can be said of it",
            "xl list shows which guests run; xen-virtioctl doctor FILE.cfg, what is wrong with the guest's file",
        ));
    }
}

fn judge_refusal(refusal: &Refusal, to: &mut Diagnosis) {
    let Refusal {
        domid,
        guest,
        key,
        error,
    } = refusal;
    let Advice { why: _, remedy } = Advice::on(error);
    to.find(Finding::warning(
        format!("guest {guest} ({domid}), {key}"),
        format_args!("was not served lately: {error}"),
        "xl gave the guest up for it; nobody knows whether that has been mended since",
        remedy,
    ));
}

fn judge(guest: &GuestReport, to: &mut Diagnosis) {
    let subject = format!("guest {} ({})", guest.name, guest.domid);
    if let Some(error) = &guest.error {
        to.find(Finding::fault(
            subject.as_str(),
            error,
            "nobody answers the guest: its accesses to its devices wait",
            "journalctl -u xen-virtiod says what keeps its worker from starting",
        ));
    }
    if guest.worker.is_none() && guest.error.is_none() {
        to.find(Finding::warning(
            subject.as_str(),
            "no worker serves it now",
            "its accesses to its devices wait",
            "one is started in a moment; else journalctl -u xen-virtiod says what keeps it from being started",
        ));
    }
    for closing in &guest.closing {
        to.find(Finding::warning(
            format!("{subject}, {}", closing.key),
            "is being taken away, when its transfers have ended",
            "the guest cannot have another one in its place before",
            "a moment, as a rule; a disk that hangs ends them when it answers again: dmesg",
        ));
    }
    if guest.restarts > 0 {
        to.find(Finding::warning(
            subject.as_str(),
            format_args!("workers of it that have died: {}", guest.restarts),
            "each was followed by another one, and nothing is lost; but none is to die",
            "journalctl -u xen-virtiod and dmesg say how each ended: by the kernel for want of memory, by somebody, or by a fault of \
             ours (SECURITY.md)",
        ));
    }
    for entry in &guest.devices {
        judge_device(&subject, entry, to);
    }
}

fn judge_device(guest: &str, entry: &EntryReport, to: &mut Diagnosis) {
    let subject = format!("{guest}, {}", entry.key);
    let before = to.findings.len();
    if let Some(error) = &entry.error {
        let Advice { why, remedy } = Advice::on(error);
        to.find(Finding::fault(subject.as_str(), error, why, remedy));
    }
    if let Some(hint) = &entry.hint {
        let Advice { why, remedy } = Advice::on(hint);
        to.find(Finding::fault(subject.as_str(), hint, why, remedy));
    }
    match &entry.device {
        Some(device) => judge_driver(&subject, entry, device, to),
        // Nobody drives a slot.
        None if entry.is_slot() && entry.is_served() => {}
        None if to.findings.len() == before => to.find(Finding::warning(
            subject.as_str(),
            format_args!("{}: its worker has not said how it is", entry.state()),
            "the guest may wait for it",
            "look again; if that stays, journalctl -u xen-virtiod, and dmesg for a disk that hangs",
        )),
        None => {}
    }
    if to.findings.len() == before {
        to.fine(subject, state(entry));
    }
}

fn judge_driver(subject: &str, entry: &EntryReport, device: &DeviceReport, to: &mut Diagnosis) {
    if let Some(failure) = &device.failure {
        let Advice { why: _, remedy } = Advice::on_worker(failure);
        to.find(Finding::fault(
            subject,
            format_args!("needs a reset; its worker says: {failure}"),
            "the guest's driver did what the specification forbids, or what Xen refused; the device does nothing until it is reset",
            remedy,
        ));
    }
    if let Some(misstep) = &device.misstep {
        let Advice { why: _, remedy } = Advice::on_worker(misstep);
        to.find(Finding::warning(
            subject,
            format_args!("its worker says: {misstep}"),
            "it kept the guest's driver from getting on",
            remedy,
        ));
    }
    if let Some(warning) = &device.warning {
        let Advice { why, remedy } = Advice::on_worker(warning);
        let warning = format_args!("its worker says: {warning}");
        to.find(Finding::warning(subject, warning, why, remedy));
    }
    if device.refused_addresses > 0 {
        to.find(Finding::warning(
            subject,
            format_args!(
                "{} addresses of the guest were refused",
                device.refused_addresses
            ),
            "its driver has named memory that it has not granted, or that it has not",
            "dmesg in the guest; a kernel with CONFIG_XEN_VIRTIO, or grant_usage=0",
        ));
    }
    if device.status & config::VIRTIO_CONFIG_S_FAILED != 0 {
        to.find(Finding::fault(
            subject,
            "the guest's driver has given it up (status bit FAILED)",
            "the guest does without the device until its driver is bound again",
            "dmesg in the guest says why",
        ));
    }
    let has_no_driver = device.status == 0 && !entry.is_slot() && entry.hint.is_none();
    if has_no_driver {
        to.find(Finding::warning(
            subject,
            "no driver has begun with it yet",
            "the guest does without the device until one does",
            "a guest that boots has one in a moment; else its kernel lacks CONFIG_VIRTIO_MMIO, the device's driver, or, with \
             grant_usage=1, CONFIG_XEN_VIRTIO: dmesg in the guest",
        ));
    }
}

/// What is said of a device with which nothing is wrong.
fn state(entry: &EntryReport) -> String {
    let negotiated = entry.device.as_ref().map_or_else(String::new, |device| {
        let names = feature_names(device.device_type, device.features);
        match names.is_empty() {
            true => String::new(),
            false => format!("; features: {}", names.join(" ")),
        }
    });
    format!("{}, {}{negotiated}", entry.detail, entry.state())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::report::{ClosingReport, sample};
    use crate::doctor::Severity;
    use crate::toolstack::libxl::{EntryForm, EntryKey};

    const OTHER: EntryKey = EntryKey {
        form: EntryForm::Virtio,
        devid: 1,
    };

    fn report(change: impl FnOnce(&mut GuestReport)) -> Report {
        let device = DeviceReport {
            device_type: 2,
            status: 0xf,
            features: 1 << 33,
            ..DeviceReport::default()
        };
        let mut report = sample::report(device);
        change(&mut report.guests[0]);
        report
    }

    fn found(report: &Report, name: &str) -> Vec<(Severity, String, String)> {
        let mut diagnosis = Diagnosis::default();
        judge_one(report, name, &mut diagnosis);
        let findings = diagnosis.findings.into_iter();
        let found = findings.map(|finding| (finding.severity, finding.subject, finding.what));
        found.collect()
    }

    #[test]
    fn a_guest_that_runs_is_fine_with_what_its_driver_has_negotiated() {
        let mut diagnosis = Diagnosis::default();
        judge_all(&report(|_| ()), &mut diagnosis);
        assert_eq!(diagnosis.findings, []);
        let [fine] = &diagnosis.fine[..] else {
            panic!("{diagnosis:?}")
        };
        assert_eq!(fine.subject, "guest ivi (3), virtio_disk/51712");
        let expected = "/dev/vg/ivi, read-write, running; features: ACCESS_PLATFORM";
        assert_eq!(fine.what, expected);
    }

    #[test]
    fn what_is_wrong_with_a_device_is_found_at_its_guest() {
        let device = "guest ivi (3), virtio_disk/51712";
        type Change = fn(&mut GuestReport);
        let cases: [(Change, Severity, &str, &str); 12] = [
            (
                |guest| guest.error = Some("no memory".into()),
                Severity::Fault,
                "guest ivi (3)",
                "no memory",
            ),
            (
                |guest| guest.restarts = 2,
                Severity::Warning,
                "guest ivi (3)",
                "died: 2",
            ),
            (
                |guest| guest.devices[0].error = Some("gone".into()),
                Severity::Fault,
                device,
                "gone",
            ),
            (
                |guest| guest.devices[0].hint = Some("no driver has begun".into()),
                Severity::Fault,
                device,
                "no driver has",
            ),
            (
                |guest| of(guest).failure = Some("a loop".into()),
                Severity::Fault,
                device,
                "needs a reset; its worker says: a loop",
            ),
            (
                |guest| of(guest).warning = Some("its back-end is away".into()),
                Severity::Warning,
                device,
                "away",
            ),
            (
                |guest| of(guest).refused_addresses = 4,
                Severity::Warning,
                device,
                "4 addresses",
            ),
            (
                |guest| of(guest).status = 0x8f,
                Severity::Fault,
                device,
                "given it up",
            ),
            (
                |guest| guest.devices[0].device = None,
                Severity::Warning,
                device,
                "starting: its worker has not said",
            ),
            (
                |guest| guest.worker = None,
                Severity::Warning,
                "guest ivi (3)",
                "no worker serves it",
            ),
            (
                |guest| {
                    guest.closing.push(ClosingReport {
                        key: OTHER,
                        base: None,
                    })
                },
                Severity::Warning,
                "guest ivi (3), virtio/1",
                "being taken away",
            ),
            (
                |guest| of(guest).status = 0,
                Severity::Warning,
                device,
                "no driver has begun with it yet",
            ),
        ];
        fn of(guest: &mut GuestReport) -> &mut DeviceReport {
            guest.devices[0].device.as_mut().unwrap()
        }
        for (change, severity, subject, what) in cases {
            for name in ["ivi", "3"] {
                let found = found(&report(change), name);
                let [(is, at, says)] = &found[..] else {
                    panic!("{what}: {found:?}")
                };
                assert_eq!((*is, at.as_str()), (severity, subject), "{says}");
                assert!(says.contains(what), "{says}");
            }
        }
    }

    #[test]
    fn a_slot_wants_no_driver() {
        let slot = report(|guest| {
            guest.devices[0].device_type = Some(0);
            guest.devices[0].device = None;
            guest.devices[0].claimed_after_ms = Some(1);
        });
        assert_eq!(found(&slot, "ivi"), []);
    }

    #[test]
    fn a_guest_that_is_not_there_was_refused_or_is_unknown() {
        let mut report = report(|_| ());
        let [(severity, subject, _)] = &found(&report, "nav")[..] else {
            panic!()
        };
        assert_eq!(
            (*severity, subject.as_str()),
            (Severity::Fault, "guest nav")
        );
        report.refusals.push(Refusal {
            domid: 9,
            guest: "nav".to_owned(),
            key: sample::DISK,
            error: "disk /x: is a read-only device".to_owned(),
        });
        let [(severity, subject, what)] = &found(&report, "nav")[..] else {
            panic!()
        };
        assert_eq!(
            (*severity, subject.as_str()),
            (Severity::Warning, "guest nav (9), virtio_disk/51712")
        );
        assert!(what.contains("read-only"), "{what}");
        // That of a guest that has its device now is of no interest.
        report.refusals[0].guest = "ivi".to_owned();
        assert_eq!(found(&report, "ivi"), []);
    }
}
