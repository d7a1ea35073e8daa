# Linux with XEN_VIRTIO, which Debian's package is built without: one image for dom0 and guests.
# shellcheck shell=bash

LINUX_SUITE=trixie
LINUX_SOURCE=linux-source-6.12

linux_dir() { cached linux "$(key_of "$BOARD/kernel.fragment" "$TOP/scripts/board.d/linux.sh")" build_linux Image; }
build_linux() {
    say "Building Linux with XEN_VIRTIO (about ten minutes on two cores)"
    local dir=$1 work
    work=$(scratch)
    fetch_package $LINUX_SUITE $LINUX_SOURCE "$work" || return 1
    dpkg-deb -x "$work"/$LINUX_SOURCE*.deb "$work/deb"
    tar -xf "$work"/deb/usr/src/linux-source-*.tar.xz -C "$work" || return 1
    local make=(make -C "$work"/$LINUX_SOURCE O="$work/build" ARCH=arm64 CROSS_COMPILE=$CROSS)
    run_logged "$dir/config.log" env KCONFIG_ALLCONFIG="$BOARD/kernel.fragment" "${make[@]}" allnoconfig
    grep -q '^CONFIG_XEN_VIRTIO=y' "$work/build/.config" || die "Linux was configured without XEN_VIRTIO"
    run_logged "$dir/build.log" "${make[@]}" -j"$(nproc)" Image modules
    find "$work/build" -name '*.ko' -exec cp {} "$dir/" \;
    cp "$work/build/arch/arm64/boot/Image" "$dir/Image" || return 1
    rm -rf "$work"
}
