SUMMARY = "virtio devices for Xen guests"
DESCRIPTION = "xen-virtiod serves virtio-mmio devices to Xen guests without QEMU; xen-virtioctl shows what it does."
LICENSE = "Apache-2.0 | BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE-APACHE;md5=3b83ef96387f14655fc854ddc3c6bd57 \
                    file://LICENSE-BSD;md5=58a985503d56d3736c4c943ba751055d"

inherit cargo systemd externalsrc

EXTERNALSRC = "${XEN_VIRTIO_SOURCES}"
PV = "0.1.0+git"

# The crates that Cargo.lock names.
require xen-virtio-crates.inc

COMPATIBLE_HOST = "(aarch64|x86_64).*-linux"
CARGO_BUILD_FLAGS:append = " --package xen-virtio-dom0-tools --package xen-virtioctl --bins"

SYSTEMD_SERVICE:${PN} = "xen-virtiod.service xen-virtio-network.socket"

do_install() {
    install -d ${D}${sbindir} ${D}${systemd_system_unitdir}
    install -m 0755 ${B}/target/${CARGO_TARGET_SUBDIR}/xen-virtiod ${B}/target/${CARGO_TARGET_SUBDIR}/xen-virtioctl ${D}${sbindir}
    install -m 0644 ${S}/dom0-tools/systemd/*.service ${S}/dom0-tools/systemd/*.socket ${D}${systemd_system_unitdir}
}

FILES:${PN} += "${systemd_system_unitdir}/xen-virtio-guest@.service ${systemd_system_unitdir}/xen-virtio-network.service"

# xl, and what a kernel that has them as modules has of Xen's devices.
RRECOMMENDS:${PN} = "xen-tools-xl kernel-module-xen-gntdev kernel-module-xen-evtchn kernel-module-xen-privcmd"
