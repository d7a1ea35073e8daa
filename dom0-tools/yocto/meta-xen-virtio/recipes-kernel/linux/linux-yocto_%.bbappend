FILESEXTRAPATHS:prepend := "${THISDIR}/files:"
SRC_URI:append:aarch64 = " file://xen-virtio-dom0.cfg file://xen-virtio-guest.cfg"
