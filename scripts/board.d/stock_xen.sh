# Debian's own Xen, which is built without ioreq servers.
# shellcheck shell=bash

stock_xen_dir() { cached "stock-xen-$XEN_VERSION" "$(key_of "$TOP/scripts/board.d/stock_xen.sh")" build_stock_xen xen; }
build_stock_xen() {
    say "Fetching Debian's Xen $XEN_VERSION"
    local dir=$1
    fetch_package "${XEN_SUITE[$XEN_VERSION]}" "xen-hypervisor-$XEN_VERSION-arm64:arm64" "$dir/deb" || return 1
    dpkg-deb -x "$dir"/deb/*.deb "$dir/root"
    mv "$dir/root/boot/xen-$XEN_VERSION-arm64" "$dir/xen"
    rm -rf "$dir/deb" "$dir/root"
}
