# Debian's own kernel for arm64, which has virtio's drivers as modules and cannot grant: for guests, and for a dom0.
# shellcheck shell=bash

KERNEL_SUITE=trixie
# What guests load of it, each after those that it wants; what the kernel has built in is not there.
DEBIAN_MODULES=(virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio virtio_blk rng-core virtio-rng
    failover net_failover virtio_net virtio_console vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport
    crc16 crc32c_generic libcrc32c mbcache jbd2 ext4 af_packet)

debian_kernel_dir() { cached debian-kernel "$(key_of "$TOP/scripts/board.d/debian_kernel.sh")" build_debian_kernel vmlinuz; }
build_debian_kernel() {
    local dir=$1 package module file
    say "Fetching Debian's kernel"
    package=$(private_apt $KERNEL_SUITE apt-cache depends linux-image-arm64:arm64 | sed -n 's/^ *Depends: \(linux-image[^:]*\).*/\1/p' | head -n1)
    [ -n "$package" ] || { undelivered "Debian $KERNEL_SUITE's kernel for arm64"; return 1; }
    fetch_package $KERNEL_SUITE "$package:arm64" "$dir/deb" || return 1
    dpkg-deb -x "$dir"/deb/linux-image*.deb "$dir/root"
    mkdir "$dir/modules"
    for module in "${DEBIAN_MODULES[@]}"; do
        file=$(find "$dir/root" -name "$module.ko*" | head -n1)
        case $file in
            '') ;;
            *.xz) xz -dc "$file" >"$dir/modules/$module.ko" ;;
            *) cp "$file" "$dir/modules/" ;;
        esac
    done
    printf '%s\n' "${DEBIAN_MODULES[@]}" >"$dir/modules/order"
    # What a dom0 of Debian's has of them: no drivers of devices that the board lacks.
    (cd "$dir"/root/usr/lib/modules/*/kernel &&
        rm -rf sound drivers/{gpu,media,infiniband,iio,scsi,staging,usb,hwmon,mtd,mmc,platform,spi,clk,pinctrl,phy} \
            drivers/net/{ethernet,wireless,phy,usb,can,dsa})
    tar -C "$dir/root/usr" -cf "$dir/modules.tar" lib/modules
    cp "$dir"/root/boot/vmlinuz-* "$dir/vmlinuz"
    cp "$dir"/root/boot/config-* "$dir/config"
    rm -rf "$dir/deb" "$dir/root"
}

# debian_guest_initramfs OUT: the guests' own, with Debian's modules.
debian_guest_initramfs() {
    local overlay
    overlay=$(scratch)
    cp -r "$(debian_kernel_dir)/modules" "$overlay/"
    guest_initramfs "$overlay" >"$1"
}
