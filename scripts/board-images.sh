# Builds what the board boots: Xen and Linux from Debian's source packages, dom0's root from its
# binary packages, the guests' initramfs. Each is cached under the hash of what it is built from.
# shellcheck shell=bash

BOARD=$TOP/tests/board
BUILDER=$TOP/scripts/board-images.sh
SUITE=trixie
CROSS=aarch64-linux-gnu-

# An apt of our own that sees Debian $SUITE, whatever this machine runs; the machine's own is not touched.
private_apt() {
    local root=$CACHE/apt
    if [ ! -f "$root/apt.conf" ]; then
        mkdir -p "$root"/{etc/apt.conf.d,etc/preferences.d,etc/sources.list.d,state/lists/partial,cache/archives/partial}
        touch "$root/state/status"
        cat >"$root/etc/sources.list.d/board.sources" <<SOURCES
Types: deb deb-src
URIs: $(debian_mirror)
Suites: $SUITE
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
        cat >"$root/apt.conf.new" <<CONF
Dir::Etc "$root/etc";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$root/etc/sources.list.d";
Dir::State "$root/state";
Dir::State::status "$root/state/status";
Dir::Cache "$root/cache";
APT::Architectures { "$(dpkg --print-architecture)"; "arm64"; };
APT::Sandbox::User "root";
CONF
        APT_CONFIG=$root/apt.conf.new run_logged "$CACHE/apt-update.log" apt-get update
        mv "$root/apt.conf.new" "$root/apt.conf"
    fi
    APT_CONFIG=$root/apt.conf "$@"
}

# The mirror that this machine uses already, so that a site's own is respected.
debian_mirror() {
    local mirror
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
        grep -E '/debian/?$' | head -n1) || true
    echo "${mirror:-http://deb.debian.org/debian}"
}

# fetch_source PACKAGE DIR: the source package's tarballs, checked against the hashes of the signed index.
# A mirror may lack the small .dsc of a version whose tarballs it serves; those are all that is needed.
fetch_source() {
    local package=$1 dir=$2
    mkdir -p "$dir"
    (
        cd "$dir"
        private_apt apt-get source --download-only "$package" >apt.log 2>&1 || true
        private_apt apt-get source --print-uris "$package" >uris.log 2>/dev/null || true
        local index
        index=$(private_apt apt-cache showsrc --only-source "$package" | sed -n '/^Checksums-Sha256:/,/^[A-Z]/{/^ /p}')
        local checked=0 hash name
        while read -r hash _ name; do
            case $name in *.tar.*) ;; *) continue ;; esac
            [ -f "$name" ] || continue
            echo "$hash  $name" | sha256sum --quiet -c - || die "$dir/$name does not match Debian's index"
            checked=$((checked + 1))
        done <<<"$index"
        [ "$checked" -ge 2 ] || { cat apt.log >&2; die "Debian's source package $package could not be downloaded"; }
    )
}

# cached NAME KEY FUNCTION: prints the directory that FUNCTION filled, filling it first if it is not there.
cached() {
    local dir=$CACHE/$1-$2
    if [ ! -e "$dir/done" ]; then
        rm -rf "$dir" && mkdir -p "$dir"
        "$3" "$dir"
        touch "$dir/done"
    fi
    echo "$dir"
}

xen_dir() { cached xen "$(key_of "$BOARD/xen.config" "$BUILDER")" build_xen; }
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

linux_dir() { cached linux "$(key_of "$BOARD/kernel.fragment" "$BUILDER")" build_linux; }
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

DOM0_PACKAGES=xen-utils-4.20,xenstore-utils,busybox-static,bash,coreutils,util-linux,mount,e2fsprogs,procps,grep,sed,gawk,findutils,tar,kexec-tools

dom0_dir() { cached dom0 "$(key_of "$BUILDER" "$BOARD/dom0-init" "$BOARD/guest-init")" build_dom0; }
build_dom0() {
    say "Building dom0's root and the guests' initramfs from Debian $SUITE's packages"
    local dir=$1 root=$1/root
    run_logged "$dir/mmdebstrap.log" as_root mmdebstrap --variant=extract --architectures=arm64 \
        --include="$DOM0_PACKAGES" "$SUITE" "$root" "$(debian_mirror)"
    # No maintainer script is run (they are arm64): what they would have linked is linked here.
    as_root bash -eu -s "$root" "$BOARD" <<'SETUP'
root=$1 board=$2
for top in bin sbin lib lib64; do
    [ -L "$root/$top" ] && continue
    if [ -d "$root/$top" ]; then cp -a "$root/$top/." "$root/usr/$top/"; rm -rf "${root:?}/$top"; fi
    mkdir -p "$root/usr/$top" && ln -s "usr/$top" "$root/$top"
done
ln -sf bash "$root/usr/bin/sh"
ln -sf gawk "$root/usr/bin/awk"
rm -rf "$root/var/run" && ln -s /run "$root/var/run"
mkdir -p "$root"/{proc,sys,dev,run,tmp,root,etc} "$root/var/log/xen/console" "$root/var/lib/xenstored" "$root/var/lib/xen"
echo 'root:x:0:0:root:/root:/bin/bash' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
install -m 755 "$board/dom0-init" "$root/init"
SETUP
    build_guest_initramfs "$root" "$dir/guest.cpio.gz"
    rm -f "$dir/root.ext4"
    as_root mke2fs -q -t ext4 -d "$root" "$dir/root.ext4" 512M >"$dir/mke2fs.log" 2>&1 || die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root"
}

# build_guest_initramfs DOM0_ROOT OUT: busybox, mke2fs with the libraries it needs, and the guests' init.
build_guest_initramfs() {
    local from=$1 out=$2 tree
    tree=$(mktemp -d -p "$CACHE")
    mkdir -p "$tree"/{bin,dev,proc,sys,mnt,tmp,lib/aarch64-linux-gnu}
    cp "$from/usr/bin/busybox" "$tree/bin/"
    cp -L "$from/usr/sbin/mke2fs" "$tree/bin/mke2fs"
    cp -L "$from/usr/lib/ld-linux-aarch64.so.1" "$tree/lib/"
    local lib
    for lib in libc.so.6 libext2fs.so.2 libcom_err.so.2 libblkid.so.1 libuuid.so.1 libe2p.so.2; do
        cp -L "$from/usr/lib/aarch64-linux-gnu/$lib" "$tree/lib/aarch64-linux-gnu/"
    done
    install -m 755 "$BOARD/guest-init" "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1) >"$out"
    rm -rf "$tree"
}
