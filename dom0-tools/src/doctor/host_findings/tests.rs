use super::*;
use crate::doctor::Severity::{self, Fault, Warning};

fn healthy() -> Host {
    Host {
        xen: Some(version(4, 20, 4)),
        ioreq_servers: Ok(true),
        nodes: NODES.iter().map(|node| (node.path, Node::Opens)).collect(),
        kernel: Kernel {
            release: "6.12.0".to_owned(),
            page_size: 4096,
            options: Some(options(&["XEN_UNPOPULATED_ALLOC"])),
            has_seccomp: true,
            has_network_namespaces: true,
            io_uring: Ok(()),
        },
        xenstore: Ok(Leftovers::default()),
        xl: Some(Xl {
            path: "/usr/sbin/xl".into(),
            version: Some((4, 20)),
        }),
        service: Service {
            listener: Ok(7),
            unit: Some(unit("loaded", "active", 7)),
            network: Some(unit("loaded", "active", 0)),
        },
        configuration: Vec::new(),
        strangers: Vec::new(),
        open_files: Vec::new(),
        state_room: Some(1 << 30),
    }
}

fn options(names: &[&str]) -> std::collections::BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn unit(load: &str, active: &str, main_pid: u32) -> Unit {
    Unit {
        load_state: load.to_owned(),
        active_state: active.to_owned(),
        sub_state: "running".to_owned(),
        file_state: "enabled".to_owned(),
        main_pid,
    }
}

fn diagnosis(host: &Host) -> Diagnosis {
    let mut diagnosis = Diagnosis::default();
    judge(host, &mut diagnosis);
    diagnosis
}

#[test]
fn a_healthy_host_has_no_finding() {
    let diagnosis = diagnosis(&healthy());
    assert_eq!(diagnosis.findings, []);
    assert!(diagnosis.fine.len() > 10, "{diagnosis}");
}

/// Each fault of a host is the one finding of it, with what mends it.
#[test]
fn each_fault_is_found_alone_with_its_remedy() {
    type Break = fn(&mut Host);
    let cases: [(Break, Severity, &str, &str); 31] = [
        (
            |host| host.xen = None,
            Warning,
            "xen",
            "CONFIG_XEN_SYS_HYPERVISOR",
        ),
        (
            |host| host.xen = Some(version(4, 20, 3)),
            Warning,
            "xen-fixes",
            "4.20.4",
        ),
        (
            |host| host.ioreq_servers = Ok(false),
            Fault,
            "ioreq",
            "CONFIG_IOREQ_SERVER=y",
        ),
        (
            |host| host.ioreq_servers = Err("?".into()),
            Warning,
            "ioreq",
            "CONFIG_IOREQ_SERVER=y",
        ),
        (
            |host| miss(host, "/dev/xen/privcmd"),
            Fault,
            "privcmd",
            "CONFIG_XEN_PRIVCMD=y",
        ),
        (
            |host| miss(host, "/dev/xen/gntdev"),
            Fault,
            "gntdev",
            "build dom0's kernel with CONFIG_XEN_GNTDEV=y",
        ),
        (
            |host| miss(host, "/dev/xen/evtchn"),
            Fault,
            "evtchn",
            "CONFIG_XEN_DEV_EVTCHN=y",
        ),
        (
            |host| {
                miss(host, "/dev/xen/gntdev");
                host.kernel.options = Some(options(&["XEN_GNTDEV", "XEN_UNPOPULATED_ALLOC"]));
            },
            Fault,
            "gntdev",
            "modprobe xen-gntdev, and at each boot",
        ),
        (
            |host| {
                drop(
                    host.nodes
                        .insert("/dev/xen/gntdev", Node::Refused("x".into())),
                )
            },
            Fault,
            "gntdev",
            "ls -l",
        ),
        (
            |host| host.kernel.page_size = 65536,
            Fault,
            "page-size",
            "CONFIG_ARM64_4K_PAGES=y",
        ),
        (
            |host| host.kernel.has_seccomp = false,
            Fault,
            "seccomp",
            "CONFIG_SECCOMP_FILTER=y",
        ),
        (
            |host| host.kernel.has_network_namespaces = false,
            Warning,
            "namespaces",
            "CONFIG_NET_NS=y",
        ),
        (
            |host| host.kernel.io_uring = Err("x".into()),
            Warning,
            "io_uring",
            "io_uring_disabled=0",
        ),
        (
            |host| host.kernel.options = Some(options(&[])),
            Warning,
            "unpopulated-alloc",
            "CONFIG_XEN_UNPOPULATED_ALLOC=y",
        ),
        (
            |host| host.xenstore = Err("x".into()),
            Fault,
            "xenstored",
            "start xenstored",
        ),
        (
            |host| host.xenstore.as_mut().unwrap().nodes.push("/n".into()),
            Warning,
            "leftovers",
            "xenstore-rm /n",
        ),
        (
            |host| host.xenstore.as_mut().unwrap().files.push("/f".into()),
            Warning,
            "leftovers",
            "rm /f",
        ),
        (|host| host.xl = None, Warning, "xl", "Xen's tools"),
        (
            |host| host.xl.as_mut().unwrap().version = Some((4, 17)),
            Fault,
            "xl",
            "the tools of Xen 4.20",
        ),
        (
            |host| host.service.unit = Some(unit("loaded", "inactive", 0)),
            Fault,
            "service",
            "kill 7",
        ),
        (
            |host| host.service.unit.as_mut().unwrap().file_state = "disabled".into(),
            Warning,
            "service",
            "systemctl enable",
        ),
        (
            |host| host.service.network = Some(unit("not-found", "inactive", 0)),
            Warning,
            "service",
            "xen-virtio-network.socket",
        ),
        (
            |host| stop(host, Some(unit("masked", "inactive", 0))),
            Fault,
            "service",
            "systemctl unmask",
        ),
        (
            |host| stop(host, Some(unit("loaded", "failed", 0))),
            Fault,
            "service",
            "says why",
        ),
        (
            |host| stop(host, Some(unit("not-found", "inactive", 0))),
            Fault,
            "service",
            "install xen-virtiod.service",
        ),
        (
            |host| stop(host, None),
            Fault,
            "service",
            "start xen-virtiod",
        ),
        (
            |host| host.strangers.push("README".into()),
            Warning,
            "configuration",
            "GUEST.toml",
        ),
        (
            |host| host.xl.as_mut().unwrap().version = None,
            Warning,
            "xl",
            "xl info",
        ),
        (
            |host| host.configuration.push("line 1".into()),
            Fault,
            "configuration",
            "xen-virtioctl check",
        ),
        (
            |host| {
                host.open_files.push(OpenFile {
                    path: "/c".into(),
                    owner: 0,
                    mode: 0o666,
                });
            },
            Fault,
            "permissions",
            "chmod go-w \"/c\"",
        ),
        (
            |host| host.state_room = Some(4096),
            Fault,
            "state",
            "remount",
        ),
    ];
    fn miss(host: &mut Host, path: &'static str) {
        host.nodes.insert(path, Node::Missing);
    }
    fn stop(host: &mut Host, unit: Option<Unit>) {
        host.service = Service {
            listener: Err("x".into()),
            unit,
            network: None,
        };
    }
    for (change, severity, subject, remedy) in cases {
        let mut host = healthy();
        change(&mut host);
        let diagnosis = diagnosis(&host);
        let [found] = &diagnosis.findings[..] else {
            panic!("{subject}, {remedy}: {diagnosis}")
        };
        assert_eq!(
            (found.severity, found.subject.as_str()),
            (severity, subject)
        );
        assert!(found.remedy.contains(remedy), "{}", found.remedy);
    }
}

#[test]
fn without_xen_nothing_else_is_judged() {
    let mut host = healthy();
    host.xen = None;
    host.nodes
        .values_mut()
        .for_each(|node| *node = Node::Missing);
    let diagnosis = diagnosis(&host);
    let subjects: Vec<_> = diagnosis
        .findings
        .iter()
        .map(|found| found.subject.as_str())
        .collect();
    assert_eq!((subjects, diagnosis.fine.len()), (vec!["xen"], 0));
}

#[test]
fn a_series_has_the_fixes_from_its_own_release_on() {
    for (major, minor, patch, lacks) in [
        (4, 17, 5, true),
        (4, 20, 3, true),
        (4, 20, 4, false),
        (4, 21, 1, true),
        (4, 21, 2, false),
        (4, 22, 0, false),
        (4, 23, 0, false),
        (5, 0, 0, false),
    ] {
        assert_eq!(
            version(major, minor, patch).lacks_fixes(),
            lacks,
            "{major}.{minor}.{patch}"
        );
    }
}

#[test]
fn an_old_xl_of_its_own_xen_is_a_warning() {
    let mut host = healthy();
    host.xen = Some(version(4, 18, 9));
    host.xl.as_mut().unwrap().version = Some((4, 18));
    let diagnosis = diagnosis(&host);
    let xl = diagnosis
        .findings
        .iter()
        .find(|found| found.subject == "xl");
    let xl = xl.unwrap();
    assert_eq!(xl.severity, Warning);
    assert!(xl.remedy.contains("4.19"), "{}", xl.remedy);
}
