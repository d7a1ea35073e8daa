//! What follows from what a host has and lacks.

use super::findings::{Diagnosis, Finding};
use super::host::{Host, Kernel, Leftovers, Node, OpenFile, Service, Unit, XenVersion, Xl};
use crate::ctl::control::ControlError;
use crate::ctl::xl_config::of_xl;
use crate::toolstack::guest_file;

/// A door of the kernel to Xen.
pub(super) struct DeviceNode {
    pub(super) path: &'static str,
    subject: &'static str,
    option: &'static str,
    module: &'static str,
    why: &'static str,
}

pub(super) const NODES: [DeviceNode; 3] = [
    DeviceNode {
        path: "/dev/xen/privcmd",
        subject: "privcmd",
        option: "CONFIG_XEN_PRIVCMD",
        module: "xen-privcmd",
        why: "the guests' register accesses, and the pages of guests without grants, are reached by it",
    },
    DeviceNode {
        path: "/dev/xen/gntdev",
        subject: "gntdev",
        option: "CONFIG_XEN_GNTDEV",
        module: "xen-gntdev",
        why: "what guests grant is copied and mapped by it: no guest is served without it",
    },
    DeviceNode {
        path: "/dev/xen/evtchn",
        subject: "evtchn",
        option: "CONFIG_XEN_DEV_EVTCHN",
        module: "xen-evtchn",
        why: "a guest's register accesses are announced by it: no guest is served without it",
    },
];

/// The first Xen on which this was seen working.
const FIRST_SEEN: (u32, u32) = (4, 17);

/// The first versions with the fixes of XSA-500, XSA-501, XSA-505 and XSA-506; later series have them.
const FIXED: [XenVersion; 3] = [version(4, 20, 4), version(4, 21, 2), version(4, 22, 0)];

/// Bytes that the state of a guest's devices may take.
const STATE_ROOM: u64 = 4 << 20;

const PAGE_SIZE: usize = xen_virtio_guest_mapping::PAGE_SIZE;

const fn version(major: u32, minor: u32, patch: u32) -> XenVersion {
    XenVersion {
        major,
        minor,
        patch,
    }
}

impl XenVersion {
    /// Whether it is older than what has the fixes of its series.
    fn lacks_fixes(self) -> bool {
        let same_series =
            |fixed: &&XenVersion| (fixed.major, fixed.minor) == (self.major, self.minor);
        match FIXED.iter().find(same_series) {
            Some(fixed) => self < *fixed,
            None => self < FIXED[0],
        }
    }
}

/// The service listens, and does not answer.
pub(super) fn service_is_silent(error: &ControlError) -> Finding {
    Finding::fault(
        "service",
        error,
        "nothing can be said of the guests, and none is given a device",
        "systemctl restart xen-virtiod: guests go on; if it hangs again, dmesg for a disk or an interface that does",
    )
}

/// Judges all of it. Where one thing follows from another, only the other is found.
pub(super) fn judge(host: &Host, to: &mut Diagnosis) {
    if host.xen.is_none() && host.nodes.values().all(|node| *node == Node::Missing) {
        to.find(Finding::fault(
            "xen",
            "this is no domain of Xen, or its kernel does not know that",
            "guests are Xen's",
            "boot Xen, with this system as its dom0; the kernel needs CONFIG_XEN and CONFIG_XEN_SYS_HYPERVISOR",
        ));
        return;
    }
    judge_xen(host.xen, to);
    for node in &NODES {
        judge_node(node, &host.nodes[node.path], &host.kernel, to);
    }
    judge_ioreq_servers(host, to);
    judge_kernel(&host.kernel, to);
    match &host.xenstore {
        Ok(leftovers) => {
            to.fine("xenstored", "it answers");
            judge_leftovers(leftovers, &host.service, to);
        }
        Err(error) => to.find(Finding::fault(
            "xenstored",
            error,
            "the toolstack tells of guests and their devices by it",
            "systemctl start xenstored, and see that xenfs is mounted (mount -t xenfs xenfs /proc/xen); without systemd \
             start xenstored and xen-init-dom0",
        )),
    }
    judge_xl(host.xl.as_ref(), host.xen, to);
    judge_service(&host.service, to);
    judge_configuration(host, to);
    if let Some(room) = host.state_room.filter(|room| *room < STATE_ROOM) {
        to.find(Finding::fault(
            "state",
            format_args!("/run has {room} bytes left"),
            "what outlives a worker is kept there: no further guest is served",
            "remove what fills /run (du -xs /run/*), or give it more: mount -o remount,size=… /run",
        ));
    }
}

fn judge_xen(xen: Option<XenVersion>, to: &mut Diagnosis) {
    let Some(xen) = xen else {
        return to.find(Finding::warning(
            "xen",
            "the version of Xen cannot be read",
            "what it lacks cannot be told",
            "CONFIG_XEN_SYS_HYPERVISOR=y in dom0's kernel",
        ));
    };
    let XenVersion {
        major,
        minor,
        patch,
    } = xen;
    let shown = format!("Xen {major}.{minor}.{patch}");
    if (major, minor) < FIRST_SEEN {
        to.find(Finding::warning(
            "xen",
            format_args!("{shown} is older than what this was seen working on"),
            "nobody has tried it",
            "Xen 4.17 or later, 4.20 for all that xl has",
        ));
    } else if !xen.lacks_fixes() {
        to.fine("xen", &shown);
    }
    if xen.lacks_fixes() {
        to.find(Finding::warning(
            "xen-fixes",
            format_args!("{shown} has not the fixes of XSA-500, XSA-501, XSA-505 and XSA-506, unless your distribution has put them in"),
            "a guest may get at Xen or at other guests by grants, event channels and device-model operations",
            "Xen 4.20.4, 4.21.2, 4.22.0 or later, or a distribution's package that names them (apt changelog)",
        ));
    }
}

fn judge_node(node: &DeviceNode, state: &Node, kernel: &Kernel, to: &mut Diagnosis) {
    let DeviceNode {
        path,
        subject,
        option,
        module,
        why,
    } = node;
    match state {
        Node::Opens => to.fine(*subject, format_args!("{path} opens")),
        Node::Missing => {
            let is_there = kernel.options.as_ref();
            let name = option.trim_start_matches("CONFIG_");
            let remedy = match is_there.map(|options| options.contains(name)) {
                Some(true) => format!(
                    "modprobe {module}, and at each boot: echo {module} >/etc/modules-load.d/xen-virtiod.conf; where {option}=y, \
                     see that devtmpfs is mounted on /dev"
                ),
                Some(false) => format!("build dom0's kernel with {option}=y"),
                None => format!("modprobe {module}, or build dom0's kernel with {option}=y"),
            };
            to.find(Finding::fault(
                *subject,
                format_args!("{path} is not there"),
                why,
                remedy,
            ));
        }
        Node::Refused(error) => to.find(Finding::fault(
            *subject,
            format_args!("{path} cannot be opened: {error}"),
            why,
            format_args!(
                "ls -l {path}: it must be a device of this kernel's, and no security module may keep root from it"
            ),
        )),
    }
}

fn judge_ioreq_servers(host: &Host, to: &mut Diagnosis) {
    match &host.ioreq_servers {
        Ok(true) => to.fine("ioreq", "Xen has ioreq servers"),
        Ok(false) => to.find(Finding::fault(
            "ioreq",
            "Xen is built without ioreq servers",
            "a guest's register accesses do not reach dom0: xl create ends with \"Xen gives no ioreq server\"",
            "build Xen with CONFIG_EXPERT=y, CONFIG_UNSUPPORTED=y and CONFIG_IOREQ_SERVER=y (Debian's packages are built without)",
        )),
        // Which is found itself.
        Err(_) if host.nodes["/dev/xen/privcmd"] != Node::Opens => {}
        Err(error) => to.find(Finding::warning(
            "ioreq",
            format_args!("whether Xen has ioreq servers cannot be told: {error}"),
            "no guest is served without them",
            "see that Xen's configuration has CONFIG_IOREQ_SERVER=y",
        )),
    }
}

fn judge_kernel(kernel: &Kernel, to: &mut Diagnosis) {
    let release = &kernel.release;
    if kernel.page_size == PAGE_SIZE {
        to.fine(
            "kernel",
            format_args!("Linux {release}, {PAGE_SIZE} bytes a page"),
        );
    } else {
        to.find(Finding::fault(
            "page-size",
            format_args!("dom0's kernel has pages of {} bytes", kernel.page_size),
            "Xen's pages have 4096, and the service does not start otherwise",
            "build dom0's kernel with CONFIG_ARM64_4K_PAGES=y",
        ));
    }
    if kernel.has_seccomp {
        to.fine("seccomp", "system calls can be filtered");
    } else {
        to.find(Finding::fault(
            "seccomp",
            "dom0's kernel cannot filter system calls",
            "a worker that its guest has taken over could do all that its user may: none is started",
            "build dom0's kernel with CONFIG_SECCOMP=y and CONFIG_SECCOMP_FILTER=y",
        ));
    }
    if kernel.has_network_namespaces {
        to.fine("namespaces", "workers are kept out of dom0's network");
    } else {
        to.find(Finding::warning(
            "namespaces",
            "dom0's kernel has no network namespaces",
            "workers stay in dom0's network; that no worker can make a socket there is left to its system call filter",
            "build dom0's kernel with CONFIG_NET_NS=y",
        ));
    }
    match &kernel.io_uring {
        Ok(()) => to.fine("io_uring", "rings can be made"),
        Err(error) => to.find(Finding::warning(
            "io_uring",
            format_args!("no ring can be made: {error}"),
            "a worker waits for each transfer of a disk itself: a slow disk holds its guest up",
            "sysctl kernel.io_uring_disabled=0 where that is not 0; else build dom0's kernel with CONFIG_IO_URING=y (Linux 5.10 \
             or later)",
        )),
    }
    let has = |option: &str| {
        kernel
            .options
            .as_ref()
            .map(|options| options.contains(option))
    };
    match has("XEN_UNPOPULATED_ALLOC") {
        Some(true) => to.fine("unpopulated-alloc", "mapped pages of guests take no memory of dom0's"),
        Some(false) => to.find(Finding::warning(
            "unpopulated-alloc",
            "dom0's kernel has no CONFIG_XEN_UNPOPULATED_ALLOC",
            "each page of a guest that is mapped takes one of dom0's memory, up to 64 MiB a guest without grants",
            "build dom0's kernel with CONFIG_XEN_UNPOPULATED_ALLOC=y (it wants CONFIG_ZONE_DEVICE)",
        )),
        None => {}
    }
}

fn judge_leftovers(leftovers: &Leftovers, service: &Service, to: &mut Diagnosis) {
    if leftovers.nodes.is_empty() && leftovers.files.is_empty() {
        return to.fine("leftovers", "nothing is left of guests that are gone");
    }
    for node in &leftovers.nodes {
        to.find(Finding::warning(
            "leftovers",
            format_args!("xenstore has {node} of a guest that is gone"),
            "another guest of that number would be taken to have these devices",
            format_args!("xenstore-rm {node}"),
        ));
    }
    for file in &leftovers.files {
        let file = file.display();
        // A service that runs removes them with their guests, if it may.
        let remedy = match service.listener {
            Ok(_) => format!("rm {file}"),
            Err(_) => "start xen-virtiod, which removes it".to_owned(),
        };
        to.find(Finding::warning(
            "leftovers",
            format_args!("{file} is of a guest that is gone"),
            "it takes room in /run",
            remedy,
        ));
    }
}

fn judge_xl(xl: Option<&Xl>, xen: Option<XenVersion>, to: &mut Diagnosis) {
    let Some(Xl { path, version }) = xl else {
        return to.find(Finding::warning(
            "xl",
            "there is no xl in PATH",
            "guests are not created by xl here: their devices are described by files of ours",
            "docs/configuration.md, \"In a file for the guest\"; or install Xen's tools",
        ));
    };
    let path = path.display();
    let xen = xen.map(|xen| (xen.major, xen.minor));
    if let (Some(xl), Some(xen)) = (*version, xen)
        && xl != xen
    {
        to.find(Finding::fault(
            "xl",
            format_args!(
                "{path} is of Xen {}.{}, and Xen {}.{} runs",
                xl.0, xl.1, xen.0, xen.1
            ),
            "a toolstack goes with its own Xen only: xl create fails",
            format_args!("install the tools of Xen {}.{}", xen.0, xen.1),
        ));
    } else if version.is_none() {
        to.find(Finding::warning(
            "xl",
            format_args!("the version of {path} cannot be told"),
            "xl of another Xen than the one that runs does not create guests; one before 4.19 has not all words for their devices",
            "xl info, whose xen_version must be that of the tools",
        ));
    } else if let Some(old) = version.and_then(of_xl) {
        to.find(Finding::warning(
            "xl",
            old,
            "by an xl file a guest has disks by foreign frames then, and no other device",
            "xl of Xen 4.19 or later, or a file for the guest (xen-virtioctl device-tree)",
        ));
    } else {
        to.fine(
            "xl",
            format_args!("{path} has virtio = [ … ] and grant_usage"),
        );
    }
}

fn judge_service(service: &Service, to: &mut Diagnosis) {
    const WHY: &str =
        "guests that run go on, and none is given a device: xl create gives up after some seconds";
    let unit = service.unit.as_ref();
    let is = |wanted: fn(&Unit) -> bool| unit.is_some_and(wanted);
    match &service.listener {
        Err(error) => {
            let (what, remedy) = if is(|unit| unit.load_state == "masked") {
                (
                    "its unit is masked",
                    "systemctl unmask xen-virtiod && systemctl enable --now xen-virtiod",
                )
            } else if is(|unit| unit.active_state == "failed" || unit.sub_state == "auto-restart") {
                (
                    "it ends again and again",
                    "journalctl -u xen-virtiod -n 30 says why; then systemctl restart xen-virtiod",
                )
            } else if is(|unit| unit.load_state == "not-found") {
                (
                    "it has no unit",
                    "install xen-virtiod.service, then systemctl enable --now xen-virtiod",
                )
            } else if unit.is_some() {
                (
                    "its unit is not started",
                    "systemctl enable --now xen-virtiod; journalctl -u xen-virtiod -n 30 if that fails",
                )
            } else {
                ("nothing listens", "start xen-virtiod, and see what it says")
            };
            to.find(Finding::fault(
                "service",
                format_args!("xen-virtiod does not run ({error}): {what}"),
                WHY,
                remedy,
            ));
        }
        Ok(pid) => {
            let loaded = unit.filter(|unit| unit.load_state == "loaded");
            match loaded {
                Some(unit) if unit.main_pid != *pid => to.find(Finding::fault(
                    "service",
                    format_args!(
                        "a xen-virtiod that systemd has not started (process {pid}) has the guests, and the unit is {}",
                        unit.active_state
                    ),
                    "two cannot serve: that of the unit does not start, and the other one's end is nobody's business",
                    format_args!("kill {pid} && systemctl restart xen-virtiod: guests go on"),
                )),
                Some(unit) if unit.file_state == "disabled" => to.find(Finding::warning(
                    "service",
                    "the unit is not enabled",
                    "after the next boot no guest has a device",
                    "systemctl enable xen-virtiod",
                )),
                _ => to.fine("service", format_args!("xen-virtiod runs as process {pid}")),
            }
            let network = service.network.as_ref();
            if loaded.is_some() && network.is_some_and(|socket| socket.active_state != "active") {
                to.find(Finding::warning(
                    "service",
                    "xen-virtio-network.socket, which has network interfaces opened for the unit, is not started",
                    "no network device gets its interface, unless the service was started without --network",
                    "systemctl enable --now xen-virtio-network.socket",
                ));
            }
        }
    }
}

fn judge_configuration(host: &Host, to: &mut Diagnosis) {
    for problem in &host.configuration {
        to.find(Finding::fault(
            "configuration",
            problem,
            "the service does not start, or the guest has no device by its file",
            "mend the file; xen-virtioctl check shows what is wrong with it",
        ));
    }
    for name in &host.strangers {
        to.find(Finding::warning(
            "configuration",
            format_args!(
                "{}/{name} is no file of a guest's: its name does not end in .toml",
                guest_file::DIRECTORY
            ),
            "no guest has its devices",
            "mv it to GUEST.toml, or elsewhere",
        ));
    }
    for OpenFile { path, owner, mode } in &host.open_files {
        to.find(Finding::fault(
            "permissions",
            format_args!(
                "{} may be written by others than root (owner {owner}, mode {mode:o})",
                path.display()
            ),
            "whoever writes it has root's service open any file, and start any program, of dom0's",
            // For a shell to take as it stands.
            format_args!("chown root:root {path:?} && chmod go-w {path:?}"),
        ));
    }
    if host.configuration.is_empty() && host.open_files.is_empty() {
        to.fine("configuration", "what is in /etc/xen-virtiod can be used");
    }
}

#[cfg(test)]
mod tests;
