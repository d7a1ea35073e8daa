//! What follows from the xl file of a guest: whether it will have its devices, and under which names.

use super::findings::{Diagnosis, Finding};
use super::guest_kernel::GuestKernel;
use super::remedies::Advice;
use crate::config::Config;
use crate::ctl::check;
use crate::ctl::xl_config::{self, Planned};
use std::path::Path;

pub(super) fn judge(path: &Path, config: &Config, to: &mut Diagnosis) {
    let subject = path.display().to_string();
    let findings = match check::xl_file(path, config, &check::guest_files()) {
        Ok(findings) => findings,
        Err(error) => {
            return to.find(Finding::fault(
                subject,
                format_args!("{error:#}"),
                "the guest's devices are not known",
                "mend the file that is named",
            ));
        }
    };
    for problem in &findings.problems {
        let Advice { why, remedy } = Advice::on(problem);
        to.find(Finding::fault(subject.as_str(), problem, why, remedy));
    }
    for warning in &findings.warnings {
        let Advice { why, remedy } = Advice::on(warning);
        to.find(Finding::warning(subject.as_str(), warning, why, remedy));
    }
    for (line, name) in findings.good.iter().zip(names(&findings.devices)) {
        to.fine(
            subject.as_str(),
            format_args!("{line}; in the guest: {name}"),
        );
    }
    if let Some(kernel) = kernel_of(path) {
        judge_kernel(Path::new(&kernel), &findings.devices, to);
    }
}

/// The guest's kernel, as its xl file says.
fn kernel_of(path: &Path) -> Option<String> {
    let settings = xl_config::parse_file(&std::fs::read(path).ok()?).ok()?;
    settings.text("kernel").map(str::to_owned)
}

/// Under which name the guest's Linux has each of `devices`.
fn names(devices: &[Planned]) -> Vec<String> {
    let mut letters = 'a'..='z';
    let name = |device: &Planned| {
        let text = |key: &str| device.settings.get(key).and_then(toml::Value::as_str);
        match device.kind {
            "blk" => match letters.next() {
                Some(letter) => format!("/dev/vd{letter}"),
                None => "/dev/vd…".to_owned(),
            },
            "rng" => "/dev/hwrng".to_owned(),
            "net" => match text("mac") {
                Some(mac) => format!("the network interface with the address {mac} (ip link)"),
                None => "a network interface (ip link)".to_owned(),
            },
            "console" => {
                "the next /dev/hvc after Xen's own, hvc0; ports with a name in /dev/virtio-ports"
                    .to_owned()
            }
            "vsock" => "AF_VSOCK, where this host is address 2".to_owned(),
            "input" => "the next /dev/input/event".to_owned(),
            "fs" => match text("tag") {
                Some(tag) => format!("mount -t virtiofs {tag} /mnt"),
                None => "mount -t virtiofs, with the back-end's tag".to_owned(),
            },
            "empty" => "nothing, until a device is attached".to_owned(),
            _ => "as its driver names it".to_owned(),
        }
    };
    devices.iter().map(name).collect()
}

fn judge_kernel(path: &Path, devices: &[Planned], to: &mut Diagnosis) {
    const SUBJECT: &str = "guest-kernel";
    let kernel = match GuestKernel::read(path) {
        Ok(Some(kernel)) => kernel,
        // Whatever that is, nothing is known of it.
        Ok(None) => return,
        Err(error) => {
            return to.find(Finding::fault(
                SUBJECT,
                format_args!("{}: {error}", path.display()),
                "xl create fails",
                "kernel = \"…\" names an image of an arm64 Linux, plain or packed by gzip",
            ));
        }
    };
    let path = path.display();
    let granting = devices.iter().find(|device| device.grants);
    let mut is_fine = true;
    if let Some(device) = granting {
        if let Some(kib @ (16 | 64)) = kernel.page_kib {
            is_fine = false;
            to.find(Finding::fault(
                SUBJECT,
                format_args!("{path} has pages of {kib} KiB, and {} is to have its pages granted", device.name),
                "Linux grants wrong frames then: the device needs a reset as soon as its driver begins",
                "grant_usage=0 in the device's line, or a guest's kernel with CONFIG_ARM64_4K_PAGES=y",
            ));
        }
        if !kernel.can_grant {
            is_fine = false;
            to.find(Finding::fault(
                SUBJECT,
                format_args!("{path} cannot grant (it has no CONFIG_XEN_VIRTIO), and {} is to have its pages granted", device.name),
                "its drivers wait for ever for the device that grants; the guest hangs early in its boot",
                "build the guest's kernel with CONFIG_XEN_VIRTIO=y, or grant_usage=0 in the device's line",
            ));
        }
    }
    if !kernel.has_mmio_driver && !devices.is_empty() {
        is_fine = false;
        to.find(Finding::warning(
            SUBJECT,
            format_args!("{path} has no driver for virtio-mmio built in"),
            "without the module virtio_mmio in its initramfs the guest finds no device",
            "build the guest's kernel with CONFIG_VIRTIO_MMIO=y, or see that virtio_mmio is in its initramfs",
        ));
    }
    if is_fine && !devices.is_empty() {
        let grants = granting.map_or("", |_| ", grants");
        to.fine(
            SUBJECT,
            format_args!(
                "{path} has virtio-mmio{grants}; the drivers of its devices are not looked for"
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_in_their_order_whatever_is_between() {
        let planned = |kind, settings: &str| Planned {
            name: String::new(),
            kind,
            settings: settings.parse().unwrap(),
            grants: true,
        };
        let names = names(&[
            planned("blk", ""),
            planned("fs", "tag = 'share'"),
            planned("blk", ""),
            planned("gpio", ""),
        ]);
        assert_eq!(
            names,
            [
                "/dev/vda",
                "mount -t virtiofs share /mnt",
                "/dev/vdb",
                "as its driver names it"
            ]
        );
    }
}
