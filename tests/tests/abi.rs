//! Every structure and constant that we share with Xen and the kernel, against the C headers
//! (`linux-libc-dev` and `libxen-dev`): the compiler checks, so a mistake is a compile error of the C file.

use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;
use xen_virtio_backend::tap;
use xen_virtio_backend::vhost_kernel::abi as vhost;
use xen_virtio_guest_mapping::xen::abi as memory;
use xen_virtio_transport::xen::abi as transport;

/// A C file of static assertions.
#[derive(Default)]
struct Checks {
    text: String,
    count: usize,
}

impl Checks {
    fn equal(&mut self, c: &str, rust: impl std::fmt::Display) {
        let _ = writeln!(
            self.text,
            "_Static_assert(({c}) == ({rust}), \"{}\");",
            c.replace('"', "")
        );
        self.count += 1;
    }
}

/// Size of a structure, and offset of each of its fields: `layout!(checks, "struct c", Rust, field: "c_field")`.
macro_rules! layout {
    ($checks:expr, $c:literal, $rust:ty $(, $field:ident : $c_field:literal)* $(,)?) => {{
        $checks.equal(concat!("sizeof(", $c, ")"), size_of::<$rust>());
        $($checks.equal(concat!("offsetof(", $c, ", ", $c_field, ")"), offset_of!($rust, $field));)*
    }};
}

fn checks() -> Checks {
    let mut c = Checks::default();
    layout!(c, "struct ioctl_gntdev_grant_ref", memory::GntdevGrantRef, domid: "domid", reference: "ref");
    layout!(c, "struct ioctl_gntdev_map_grant_ref", memory::GntdevMapGrantRefHeader,
        count: "count", index: "index", refs: "refs");
    c.equal(
        "offsetof(struct ioctl_gntdev_map_grant_ref, refs)",
        offset_of!(memory::GntdevMapGrantRef, refs),
    );
    layout!(c, "struct ioctl_gntdev_unmap_grant_ref", memory::GntdevUnmapGrantRef, index: "index", count: "count");
    layout!(c, "struct gntdev_grant_copy_segment", memory::GntdevGrantCopySegment,
        source: "source", dest: "dest", len: "len", flags: "flags", status: "status");
    let foreign = "offsetof(struct gntdev_grant_copy_segment, source.foreign";
    c.equal(
        &format!("{foreign}.ref)"),
        offset_of!(memory::GrantCopyForeign, reference),
    );
    c.equal(
        &format!("{foreign}.offset)"),
        offset_of!(memory::GrantCopyForeign, offset),
    );
    c.equal(
        &format!("{foreign}.domid)"),
        offset_of!(memory::GrantCopyForeign, domid),
    );
    layout!(c, "struct ioctl_gntdev_grant_copy", memory::GntdevGrantCopy, count: "count", segments: "segments");
    layout!(c, "struct privcmd_mmapbatch_v2", memory::PrivcmdMmapbatchV2,
        num: "num", dom: "dom", addr: "addr", arr: "arr", err: "err");
    layout!(c, "struct privcmd_mmap_resource", memory::PrivcmdMmapResource,
        dom: "dom", kind: "type", id: "id", idx: "idx", num: "num", addr: "addr");
    layout!(c, "struct privcmd_hypercall", transport::PrivcmdHypercall, op: "op", arg: "arg");
    layout!(c, "struct xen_domctl", transport::Domctl,
        cmd: "cmd", interface_version: "interface_version", domain: "domain", argument: "u");
    c.equal("__HYPERVISOR_domctl", transport::HYPERVISOR_DOMCTL);
    layout!(c, "struct privcmd_dm_op", transport::PrivcmdDmOp, dom: "dom", num: "num", ubufs: "ubufs");
    layout!(c, "struct privcmd_dm_op_buf", transport::PrivcmdDmOpBuf, uptr: "uptr", size: "size");
    layout!(c, "struct ioctl_evtchn_bind_interdomain", transport::EvtchnBindInterdomain,
        remote_domain: "remote_domain", remote_port: "remote_port");
    layout!(c, "struct ioctl_evtchn_notify", transport::EvtchnPort, port: "port");
    layout!(c, "struct ioctl_evtchn_restrict_domid", transport::EvtchnRestrictDomid, domid: "domid");
    layout!(c, "struct xen_dm_op", transport::DmOp, op: "op", pad: "pad", argument: "u");
    layout!(c, "struct xen_dm_op_create_ioreq_server", transport::CreateIoreqServer,
        handle_bufioreq: "handle_bufioreq", id: "id");
    layout!(c, "struct xen_dm_op_ioreq_server_range", transport::IoreqServerRange,
        id: "id", kind: "type", start: "start", end: "end");
    layout!(c, "struct xen_dm_op_set_ioreq_server_state", transport::SetIoreqServerState, id: "id", enabled: "enabled");
    layout!(c, "struct xen_dm_op_set_irq_level", transport::SetIrqLevel, irq: "irq", level: "level");
    layout!(c, "struct xen_dm_op_nr_vcpus", transport::NrVcpus, vcpus: "vcpus");
    layout!(c, "struct ioreq", transport::Ioreq,
        addr: "addr", data: "data", count: "count", size: "size", vp_eport: "vp_eport", kind: "type");
    // A bit-field has no offset; it lies in the byte before the type.
    c.equal(
        "offsetof(struct ioreq, type) - 1",
        offset_of!(transport::Ioreq, flags),
    );
    c.equal("sizeof(struct vhost_memory)", vhost::VHOST_MEMORY_HEADER);
    c.equal(
        "sizeof(struct vhost_memory) + sizeof(struct vhost_memory_region)",
        size_of::<vhost::VhostMemory>(),
    );
    c.equal(
        "offsetof(struct vhost_memory, nregions)",
        offset_of!(vhost::VhostMemory, nregions),
    );
    for (field, offset) in [
        (
            "guest_phys_addr",
            offset_of!(vhost::VhostMemory, guest_phys_addr),
        ),
        ("memory_size", offset_of!(vhost::VhostMemory, memory_size)),
        (
            "userspace_addr",
            offset_of!(vhost::VhostMemory, userspace_addr),
        ),
        (
            "flags_padding",
            offset_of!(vhost::VhostMemory, flags_padding),
        ),
    ] {
        c.equal(
            &format!("sizeof(struct vhost_memory) + offsetof(struct vhost_memory_region, {field})"),
            offset,
        );
    }
    layout!(c, "struct vhost_vring_state", vhost::VhostVringState, index: "index", num: "num");
    layout!(c, "struct vhost_vring_file", vhost::VhostVringFile, index: "index", fd: "fd");
    layout!(c, "struct vhost_vring_addr", vhost::VhostVringAddr,
        index: "index", flags: "flags", desc_user_addr: "desc_user_addr", used_user_addr: "used_user_addr",
        avail_user_addr: "avail_user_addr", log_guest_addr: "log_guest_addr");
    for (name, number) in [
        ("VHOST_GET_FEATURES", vhost::VHOST_GET_FEATURES),
        ("VHOST_SET_FEATURES", vhost::VHOST_SET_FEATURES),
        ("VHOST_SET_OWNER", vhost::VHOST_SET_OWNER),
        ("VHOST_SET_MEM_TABLE", vhost::VHOST_SET_MEM_TABLE),
        ("VHOST_SET_VRING_NUM", vhost::VHOST_SET_VRING_NUM),
        ("VHOST_SET_VRING_ADDR", vhost::VHOST_SET_VRING_ADDR),
        ("VHOST_SET_VRING_BASE", vhost::VHOST_SET_VRING_BASE),
        ("VHOST_GET_VRING_BASE", vhost::VHOST_GET_VRING_BASE),
        ("VHOST_SET_VRING_KICK", vhost::VHOST_SET_VRING_KICK),
        ("VHOST_SET_VRING_CALL", vhost::VHOST_SET_VRING_CALL),
        ("VHOST_SET_VRING_ERR", vhost::VHOST_SET_VRING_ERR),
        ("VHOST_NET_SET_BACKEND", vhost::VHOST_NET_SET_BACKEND),
        (
            "VHOST_VSOCK_SET_GUEST_CID",
            vhost::VHOST_VSOCK_SET_GUEST_CID,
        ),
        ("VHOST_VSOCK_SET_RUNNING", vhost::VHOST_VSOCK_SET_RUNNING),
        ("TUNSETIFF", tap::TUNSETIFF),
        ("TUNSETOFFLOAD", tap::TUNSETOFFLOAD),
        ("TUNSETPERSIST", tap::TUNSETPERSIST),
        ("TUNSETQUEUE", tap::TUNSETQUEUE),
        ("TUNSETSNDBUF", tap::TUNSETSNDBUF),
        ("TUNSETVNETHDRSZ", tap::TUNSETVNETHDRSZ),
    ] {
        c.equal(name, number);
    }
    for (name, number) in [
        (
            "IOCTL_GNTDEV_MAP_GRANT_REF",
            memory::IOCTL_GNTDEV_MAP_GRANT_REF,
        ),
        (
            "IOCTL_GNTDEV_UNMAP_GRANT_REF",
            memory::IOCTL_GNTDEV_UNMAP_GRANT_REF,
        ),
        ("IOCTL_GNTDEV_GRANT_COPY", memory::IOCTL_GNTDEV_GRANT_COPY),
        (
            "IOCTL_PRIVCMD_MMAPBATCH_V2",
            memory::IOCTL_PRIVCMD_MMAPBATCH_V2,
        ),
        ("IOCTL_PRIVCMD_RESTRICT", memory::IOCTL_PRIVCMD_RESTRICT),
        (
            "IOCTL_PRIVCMD_MMAP_RESOURCE",
            memory::IOCTL_PRIVCMD_MMAP_RESOURCE,
        ),
        (
            "IOCTL_PRIVCMD_HYPERCALL",
            transport::IOCTL_PRIVCMD_HYPERCALL,
        ),
        ("IOCTL_PRIVCMD_DM_OP", transport::IOCTL_PRIVCMD_DM_OP),
        (
            "IOCTL_EVTCHN_BIND_INTERDOMAIN",
            transport::IOCTL_EVTCHN_BIND_INTERDOMAIN,
        ),
        ("IOCTL_EVTCHN_NOTIFY", transport::IOCTL_EVTCHN_NOTIFY),
        (
            "IOCTL_EVTCHN_RESTRICT_DOMID",
            transport::IOCTL_EVTCHN_RESTRICT_DOMID,
        ),
    ] {
        c.equal(name, number);
    }
    for (name, number) in [
        (
            "XEN_DMOP_create_ioreq_server",
            transport::XEN_DMOP_CREATE_IOREQ_SERVER,
        ),
        (
            "XEN_DMOP_map_io_range_to_ioreq_server",
            transport::XEN_DMOP_MAP_IO_RANGE_TO_IOREQ_SERVER,
        ),
        (
            "XEN_DMOP_set_ioreq_server_state",
            transport::XEN_DMOP_SET_IOREQ_SERVER_STATE,
        ),
        ("XEN_DOMCTL_pausedomain", transport::XEN_DOMCTL_PAUSEDOMAIN),
        (
            "XEN_DOMCTL_unpausedomain",
            transport::XEN_DOMCTL_UNPAUSEDOMAIN,
        ),
        ("XEN_DMOP_set_irq_level", transport::XEN_DMOP_SET_IRQ_LEVEL),
        ("XEN_DMOP_nr_vcpus", transport::XEN_DMOP_NR_VCPUS),
        (
            "XEN_DMOP_IO_RANGE_MEMORY",
            transport::XEN_DMOP_IO_RANGE_MEMORY,
        ),
        (
            "HVM_IOREQSRV_BUFIOREQ_OFF",
            transport::HVM_IOREQSRV_BUFIOREQ_OFF.into(),
        ),
        ("STATE_IOREQ_READY", transport::STATE_IOREQ_READY.into()),
        (
            "STATE_IOREQ_INPROCESS",
            transport::STATE_IOREQ_INPROCESS.into(),
        ),
        ("STATE_IORESP_READY", transport::STATE_IORESP_READY.into()),
        ("IOREQ_TYPE_COPY", transport::IOREQ_TYPE_COPY.into()),
        (
            "IOREQ_TYPE_INVALIDATE",
            transport::IOREQ_TYPE_INVALIDATE.into(),
        ),
        (
            "XENMEM_resource_ioreq_server",
            memory::RESOURCE_IOREQ_SERVER,
        ),
        (
            "XENMEM_resource_ioreq_server_frame_ioreq(0)",
            memory::IOREQ_SERVER_FRAME_IOREQ,
        ),
        ("GNTCOPY_source_gref", memory::GNTCOPY_SOURCE_GREF.into()),
        ("GNTCOPY_dest_gref", memory::GNTCOPY_DEST_GREF.into()),
    ] {
        c.equal(name, number);
    }
    c
}

const HEADERS: &str = "
    #include <stddef.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <linux/types.h>
    #define __XEN_TOOLS__ 1
    #include <xen/xen.h>
    #include <xen/event_channel.h>
    #include <xen/grant_table.h>
    #include <xen/memory.h>
    #include <xen/domctl.h>
    #include <xen/hvm/dm_op.h>
    #include <xen/hvm/ioreq.h>
    #include <xen/hvm/hvm_op.h>
    #include <xen/privcmd.h>
    #include <xen/gntdev.h>
    #include <xen/evtchn.h>
    #include <linux/vhost.h>
    #include <linux/if_tun.h>
";

/// Compiles the checks; what the compiler says if it refuses.
fn compile(checks: &Checks) -> Result<(), String> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let include = directory.path().join("xen/interface");
    std::fs::create_dir_all(&include).expect("a directory in it");
    // The kernel's privcmd.h names Xen's header as it is called inside the kernel.
    std::fs::write(include.join("xen.h"), "#include <xen/xen.h>\n").expect("a file in it");
    let file = directory.path().join("abi.c");
    std::fs::write(&file, format!("{HEADERS}\n{}", checks.text)).expect("a file in it");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-fsyntax-only", "-I"])
        .arg(directory.path())
        .arg(&file)
        .output()
        .expect("a C compiler: apt-get install gcc linux-libc-dev libxen-dev");
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn every_layout_and_number_is_what_the_headers_say() {
    let checks = checks();
    assert!(checks.count > 100, "only {} checks", checks.count);
    if let Err(said) = compile(&checks) {
        panic!("{said}");
    }
}

#[test]
fn a_wrong_layout_would_be_found() {
    let mut checks = checks();
    checks.equal("sizeof(struct ioreq)", size_of::<transport::Ioreq>() + 1);
    assert!(
        compile(&checks)
            .unwrap_err()
            .contains("sizeof(struct ioreq)")
    );
}
