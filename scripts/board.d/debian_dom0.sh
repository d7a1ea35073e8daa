# A dom0 of Debian's: its systemd, its kernel, its Xen tools, as apt would have installed them.
# shellcheck shell=bash

DEBIAN_DOM0_PACKAGES=systemd-sysv,udev,dbus,kmod,procps,e2fsprogs,busybox-static,gawk,device-tree-compiler,apt-utils

# systemd takes its own way to the root's init.
DEBIAN_DOM0_ARGS='console=hvc0 quiet loglevel=4 systemd.show_status=false'

debian_dom0_dir() {
    cached "debian-dom0-$XEN_VERSION" "$(key_of "$TOP"/scripts/board.d/debian_{dom0,kernel}.sh "$BOARD"/debian/*)" build_debian_dom0 root.ext4
}
build_debian_dom0() {
    local dir=$1 root=$1/root kernel suite=${XEN_SUITE[$XEN_VERSION]}
    need debootstrap kmod
    say "Building a dom0 of Debian $suite with systemd (ten to twenty minutes, once: its packages are configured in QEMU)"
    kernel=$(debian_kernel_dir) || return 1
    tried_twice "Debian $suite's packages" run_quietly "$dir/debootstrap.log" unpack_debian "$suite" "$root" ||
        { tail -n 5 "$dir/debootstrap.log" >&2; undelivered "Debian $suite's packages (arm64)"; return 1; }
    as_root bash -eu -s "$root" "$BOARD/debian" "$kernel" <<'SETUP'
root=$1 debian=$2 kernel=$3
install -m 755 "$debian/second-stage" "$debian/board" "$root/usr/sbin/"
install -m 644 "$debian/board.service" "$root/etc/systemd/system/"
tar -C "$root/usr" -xf "$kernel/modules.tar"
depmod --basedir "$root" "$(ls "$root/usr/lib/modules")"
echo dom0 >"$root/etc/hostname"
# In a container, debootstrap makes links to themselves of them.
for dir in proc sys dev; do [ ! -L "$root/$dir" ] || { rm "$root/$dir" && mkdir "$root/$dir"; }; done
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io"
SETUP
    debian_initrd "$root" "$kernel" "$dir/initrd"
    as_root mke2fs -q -t ext4 -d "$root" "$dir/new.ext4" 1500M >"$dir/mke2fs.log" 2>&1 || die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root"
    second_stage "$dir" || return 1
    mv "$dir/new.ext4" "$dir/root.ext4"
}

unpack_debian() {
    as_root rm -rf "$2"
    as_root debootstrap --foreign --arch=arm64 --variant=minbase --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --include="xen-utils-$XEN_VERSION,$DEBIAN_DOM0_PACKAGES" "$1" "$2" "$(debian_mirror)"
}

# debian_initrd ROOT KERNEL OUT: Debian's own would have drivers for every board there is.
debian_initrd() {
    local tree
    tree=$(scratch)
    mkdir -p "$tree"/{bin,dev,proc,root}
    # It is not unpacked yet.
    dpkg-deb --fsys-tarfile "$1"/var/cache/apt/archives/busybox-static_*.deb | tar -xO ./bin/busybox >"$tree/bin/busybox"
    chmod +x "$tree/bin/busybox"
    cp -r "$2/modules" "$tree/"
    install -m 755 "$BOARD/debian/initrd-init" "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1) >"$3"
    rm -rf "$tree"
}

# second_stage DIR: the packages' scripts are arm64's, and want a system: QEMU's machine with the board's kernel.
second_stage() {
    local log=$1/second-stage.log
    timeout 2400 qemu-system-aarch64 -machine virt,gic-version=3 -cpu cortex-a57 -smp 2 -m 2048 -accel tcg,thread=multi,tb-size=512 \
        -nographic -no-reboot -nodefaults -serial stdio -kernel "$(linux_dir)/Image" \
        -append "root=/dev/vda rw init=/usr/sbin/second-stage console=ttyAMA0 quiet" \
        -drive if=none,id=root,file="$1/new.ext4",format=raw,cache=unsafe -device virtio-blk-device,drive=root >"$log" 2>&1 </dev/null
    grep -q '^SECOND-STAGE-DONE' "$log" || { tail -n 20 "$log" >&2; die "Debian's packages were not configured: $log"; }
}
