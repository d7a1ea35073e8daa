# Linux with XEN_VIRTIO, which Debian's package is built without: one image for dom0 and guests.
# shellcheck shell=bash

linux_dir() { cached linux "$(key_of "$BOARD/kernel.fragment" "$TOP/scripts/board.d/linux.sh")" build_linux; }
build_linux() {
    say "Building Linux with XEN_VIRTIO (about ten minutes on two cores)"
    local dir=$1 work
    work=$(mktemp -d -p "$CACHE")
    (cd "$work" && run_logged "$dir/download.log" private_apt apt-get download linux-source-6.12)
    dpkg-deb -x "$work"/linux-source-*.deb "$work/deb"
    tar -xf "$work"/deb/usr/src/linux-source-*.tar.xz -C "$work"
    local make=(make -C "$work"/linux-source-6.12 O="$work/build" ARCH=arm64 CROSS_COMPILE=$CROSS)
    run_logged "$dir/config.log" env KCONFIG_ALLCONFIG="$BOARD/kernel.fragment" "${make[@]}" allnoconfig
    grep -q '^CONFIG_XEN_VIRTIO=y' "$work/build/.config" || die "Linux was configured without XEN_VIRTIO"
    run_logged "$dir/build.log" "${make[@]}" -j"$(nproc)" Image
    cp "$work/build/arch/arm64/boot/Image" "$dir/Image"
    rm -rf "$work"
}
