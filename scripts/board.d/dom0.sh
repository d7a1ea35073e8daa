# dom0's root, from Debian's binary packages, and the guests' initramfs.
# shellcheck shell=bash

DOM0_PACKAGES=xenstore-utils,busybox-static,bash,coreutils,util-linux,mount,e2fsprogs,procps,grep,sed,gawk,findutils,tar
DOM0_PACKAGES+=,dmsetup,device-tree-compiler

# A toolstack goes with its own Xen only.
dom0_dir() {
    cached "dom0-$XEN_VERSION" "$(key_of "$TOP/scripts/board.d/dom0.sh" "$BOARD/dom0-init" "$BOARD/guest-init")" build_dom0 root.ext4
}
build_dom0() {
    local dir=$1 root=$1/root suite=${XEN_SUITE[$XEN_VERSION]}
    say "Building dom0's root and the guests' initramfs from Debian $suite's packages"
    debian_root "$suite" "xen-utils-$XEN_VERSION,$DOM0_PACKAGES" "$root" "$dir/mmdebstrap.log" || return 1
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
    tree=$(scratch)
    mkdir -p "$tree"/{bin,dev,proc,sys,mnt,tmp,lib/aarch64-linux-gnu}
    cp "$from/usr/bin/busybox" "$tree/bin/"
    # Under a name that busybox has no applet for.
    cp -L "$from/usr/sbin/mke2fs" "$tree/bin/mkfs.ext4"
    cp -L "$from/usr/lib/ld-linux-aarch64.so.1" "$tree/lib/"
    local lib
    for lib in libc.so.6 libext2fs.so.2 libcom_err.so.2 libblkid.so.1 libuuid.so.1 libe2p.so.2; do
        cp -L "$from/usr/lib/aarch64-linux-gnu/$lib" "$tree/lib/aarch64-linux-gnu/"
    done
    install -m 755 "$BOARD/guest-init" "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1) >"$out"
    rm -rf "$tree"
}
