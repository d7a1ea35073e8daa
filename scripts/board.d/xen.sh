# Xen with IOREQ_SERVER, which Debian's package is built without: one given by the user, or built from Debian's source.
# shellcheck shell=bash

# Newest first: the first that the mirror serves the source of is taken.
XEN_VERSIONS=(4.20 4.17)
# The Debian release whose Xen, and so whose toolstack, has that version.
declare -A XEN_SUITE=([4.20]=trixie [4.17]=bookworm)

# choose_xen: sets XEN_FILE and XEN_VERSION to the first hypervisor that can be had. Fails, having said why, if there is none.
choose_xen() {
    [ -z "${XEN_FILE:-}" ] || return 0
    local version dir status
    if [ -n "${XEN:-}" ]; then
        take_given_xen
        return
    fi
    for version in "${XEN_VERSIONS[@]}"; do
        dir=$CACHE/xen-$version-$(xen_key)
        [ -s "$dir/xen" ] && XEN_FILE=$dir/xen XEN_VERSION=$version && return
    done
    for version in "${XEN_VERSIONS[@]}"; do
        status=0
        dir=$(XEN_VERSION=$version cached "xen-$version" "$(xen_key)" build_xen xen) || status=$?
        case $status in
            0) XEN_FILE=$dir/xen XEN_VERSION=$version && return ;;
            "$UNDELIVERED") say "The board cannot have Xen $version, and looks for another one" ;;
            # It is there, and something is wrong with this machine or with us: not to be taken for a lack of Xen.
            *) exit $status ;;
        esac
    done
    complain "no Xen can be had: set XEN=…/xen to one of your own (scripts/board help says what it needs)"
    return 1
}

# A hypervisor says its version on its console before it needs anything; its toolstack must have the same.
take_given_xen() {
    local version dir
    [ -f "$XEN" ] || die "XEN=$XEN is no file"
    dir=$(scratch)
    device_tree "$XEN" "$dir/board.dtb"
    version=$(timeout 60 qemu-system-aarch64 "${MACHINE[@]}" -accel tcg -nographic -no-reboot -nodefaults -serial stdio \
        -kernel "$XEN" -dtb "$dir/board.dtb" 2>&1 </dev/null | sed -n 's/.*Xen \(version \)\?\([0-9]\+\.[0-9]\+\).*/\2/p;t quit;b;:quit;q') || true
    [ -n "$version" ] || die "XEN=$XEN does not say its version when it is booted: is it Xen's arm64 image (xen/xen)?"
    [ -n "${XEN_SUITE[$version]:-}" ] ||
        die "XEN=$XEN is Xen $version; Debian has the toolstack of: ${XEN_VERSIONS[*]}"
    XEN_FILE=$(realpath "$XEN") XEN_VERSION=$version
}

xen_key() { key_of "$BOARD/xen.config" "$TOP/scripts/board.d/xen.sh"; }
build_xen() {
    say "Building Xen $XEN_VERSION with IOREQ_SERVER (about half a minute)"
    local dir=$1 work
    work=$(scratch)
    fetch_source "${XEN_SUITE[$XEN_VERSION]}" xen "$work/source" || return $UNDELIVERED
    mkdir "$work/xen"
    tar -xf "$work"/source/xen_*.orig.tar.* -C "$work/xen" --strip-components=1 || return 1
    # A compiler newer than this Xen warns of more than its authors saw.
    local make=(make -C "$work/xen/xen" XEN_TARGET_ARCH=arm64 CROSS_COMPILE=$CROSS EXTRA_CFLAGS_XEN_CORE=-Wno-error)
    run_logged "$dir/config.log" "${make[@]}" KCONFIG_ALLCONFIG="$BOARD/xen.config" alldefconfig
    run_logged "$dir/build.log" "${make[@]}" -j"$(nproc)"
    grep -q '^CONFIG_IOREQ_SERVER=y' "$work/xen/xen/.config" || die "Xen was configured without IOREQ_SERVER"
    cp "$work/xen/xen/xen" "$dir/xen" || return 1
    rm -rf "$work"
}
