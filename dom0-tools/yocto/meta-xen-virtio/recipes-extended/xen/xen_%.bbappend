FILESEXTRAPATHS:prepend := "${THISDIR}/files:"
SRC_URI:append:aarch64 = " file://ioreq-server.cfg"
