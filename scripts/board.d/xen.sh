# Xen with IOREQ_SERVER, which Debian's package is built without.
# shellcheck shell=bash

xen_dir() { cached xen "$(key_of "$BOARD/xen.config" "$TOP/scripts/board.d/xen.sh")" build_xen; }
build_xen() {
    say "Building Xen with IOREQ_SERVER (about half a minute)"
    local dir=$1 work
    work=$(mktemp -d -p "$CACHE")
    fetch_source xen "$work/source"
    mkdir "$work/xen"
    tar -xf "$work"/source/xen_*.orig.tar.* -C "$work/xen" --strip-components=1
    local make=(make -C "$work/xen/xen" XEN_TARGET_ARCH=arm64 CROSS_COMPILE=$CROSS)
    run_logged "$dir/config.log" "${make[@]}" KCONFIG_ALLCONFIG="$BOARD/xen.config" alldefconfig
    run_logged "$dir/build.log" "${make[@]}" -j"$(nproc)"
    grep -q '^CONFIG_IOREQ_SERVER=y' "$work/xen/xen/.config" || die "Xen was configured without IOREQ_SERVER"
    cp "$work/xen/xen/xen" "$dir/xen"
    rm -rf "$work"
}
