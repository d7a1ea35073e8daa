# Boots the board: QEMU's arm64 `virt` machine with virtualisation, Xen, dom0 and a payload disk.
# shellcheck shell=bash

XEN_ARGS='dom0_mem=768M dom0_max_vcpus=1 console=dtuart dtuart=/pl011@9000000 loglvl=warning guest_loglvl=warning'
DOM0_ARGS='root=/dev/vda rw init=/init console=hvc0 quiet loglevel=4'
KERNEL_ADDRESS=0x50000000
MACHINE=(-machine virt,virtualization=on,gic-version=3 -cpu cortex-a57 -smp 2 -m 2048)

# board_boot PAYLOAD_DIR [QEMU_OPTION...]: boots with the payload in dom0's /payload; dom0 runs /payload/main.
# Disks among the options come after the board's own. The console goes to standard output. Returns main's exit
# status; 3 if the board ended without one, or not within BOARD_SECONDS.
board_boot() {
    local payload=$1 work=$WORK/boot console=$WORK/boot/console
    shift
    rm -rf "$work" && mkdir "$work"
    tar -C "$payload" --mtime=@0 -cf "$work/payload.tar" .
    device_tree "$(linux_dir)/Image" "$work/board.dtb"
    timeout --foreground "${BOARD_SECONDS:-600}" \
        qemu-system-aarch64 "${MACHINE[@]}" -accel tcg,thread=multi -nographic -no-reboot -nodefaults -serial stdio \
        -kernel "$(xen_dir)/xen" -dtb "$work/board.dtb" \
        -device loader,file="$(linux_dir)/Image",addr=$KERNEL_ADDRESS,force-raw=on \
        -drive if=none,id=root,file="$(dom0_dir)/root.ext4",format=raw,snapshot=on \
        -drive if=none,id=payload,file="$work/payload.tar",format=raw,readonly=on \
        "$@" -device virtio-blk-device,drive=payload -device virtio-blk-device,drive=root |
        tee "$console"
    local status
    status=$(tr -d '\r' <"$console" | sed -n 's/^BOARD-EXIT //p' | tail -n1)
    return "${status:-3}"
}

# device_tree IMAGE OUT: QEMU's own device tree, with the node that tells Xen where dom0's kernel is.
device_tree() {
    local image=$1 out=$2 size
    size=$(printf '0x%x' "$(stat -c %s "$image")")
    qemu-system-aarch64 "${MACHINE[@]}" -nodefaults -display none -machine dumpdtb="$out.qemu" >/dev/null 2>&1 ||
        die "QEMU did not write its device tree"
    {
        dtc -q -I dtb -O dts "$out.qemu"
        cat <<DTS
/ {
    chosen {
        #address-cells = <2>;
        #size-cells = <2>;
        xen,xen-bootargs = "$XEN_ARGS";
        module@50000000 {
            compatible = "multiboot,kernel", "multiboot,module";
            reg = <0x0 $KERNEL_ADDRESS 0x0 $size>;
            bootargs = "$DOM0_ARGS";
        };
    };
};
DTS
    } | dtc -q -I dts -O dtb -o "$out"
}
