# A guest of QEMU, with Debian's kernel, whose disk and entropy are devices of ours at vhost-user sockets.
# shellcheck shell=bash

# vmm_serve NAME DEVICE: a device of ours at $WORK/NAME.sock, by the program for this machine; its number is appended to SERVING.
vmm_serve() {
    "$CARGO_TARGET_DIR/debug/xen-virtiod" serve-vhost-user "$WORK/$1.sock" "$2" >"$WORK/$1.log" 2>&1 &
    SERVING+=($!)
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        [ ! -S "$WORK/$1.sock" ] || return 0
        sleep 0.1
    done
    die "no device at $WORK/$1.sock: $(cat "$WORK/$1.log")"
}

# vmm_monitor COMMAND: has QEMU do it.
vmm_monitor() {
    python3 - "$WORK/monitor" "$1" <<'PYTHON'
import socket, sys
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(sys.argv[1])
monitor.settimeout(10)
said = b""
while not said.endswith(b"(qemu) "):
    said += monitor.recv(4096)
monitor.sendall(sys.argv[2].encode() + b"\n")
said = b""
while not said.endswith(b"(qemu) "):
    said += monitor.recv(4096)
PYTHON
}

vmm_has_said() { tr -d '\r' <"$WORK/vmm.log" | grep -aqE "$1"; }
# vmm_said PATTERN SECONDS: waits until the guest's console has a line that matches.
vmm_said() {
    local limit=$((SECONDS + $2))
    until vmm_has_said "$1"; do
        [ $SECONDS -lt $limit ] && ! vmm_has_said 'guest: FAIL|Kernel panic' && kill -0 "$QEMU" 2>/dev/null ||
            { tail -n 30 "$WORK/vmm.log" "$WORK"/{blk,rng}.log; die "the guest of QEMU did not say '$1'"; }
        sleep 0.2
    done
}

# What board_vmm has started, and ends whichever way it ends.
SERVING=()
QEMU=
end_vmm() { kill "${SERVING[@]}" $QEMU 2>/dev/null || true; }

board_vmm() {
    local pause
    board_packages
    choose_xen || exit $NO_XEN
    debian_kernel_dir >/dev/null || exit $UNDELIVERED
    debian_guest_initramfs "$WORK/initramfs"
    need_rust
    cargo build --quiet --locked --manifest-path "$TOP/Cargo.toml" --bin xen-virtiod
    truncate -s 64M "$WORK/vmm.img"
    trap 'end_vmm; remove_scratch' EXIT
    vmm_serve blk "blk, path=$WORK/vmm.img"
    vmm_serve rng rng
    say "A guest of QEMU with Debian's kernel uses our disk and entropy over vhost-user"
    : >"$WORK/vmm.log"
    qemu-system-aarch64 -machine virt,gic-version=3,memory-backend=memory -cpu cortex-a57 -smp 2 -m 512 -accel tcg,thread=multi \
        -object memory-backend-memfd,id=memory,size=512M,share=on -nodefaults -display none -no-reboot \
        -serial file:"$WORK/vmm.log" -monitor unix:"$WORK/monitor",server=on,wait=off \
        -kernel "$(debian_kernel_dir)/vmlinuz" -initrd "$WORK/initramfs" -append 'console=ttyAMA0 quiet GUEST=vmm rdinit=/init' \
        -chardev socket,id=blk,path="$WORK/blk.sock" -device vhost-user-blk-pci,chardev=blk,num-queues=2 \
        -chardev socket,id=rng,path="$WORK/rng.sock" -device vhost-user-rng-pci,chardev=rng,indirect_desc=off \
        >"$WORK/qemu.log" 2>&1 &
    QEMU=$!
    vmm_said 'verifying:' 120
    # Each gives the queues back, and starts them where they were.
    for pause in 1 2 3; do
        vmm_monitor stop
        sleep 0.2
        vmm_monitor cont
        sleep 0.5
    done
    vmm_said 'guest: done' 120
    tr -d '\r' <"$WORK/vmm.log" | grep -aE '^(guest:|verified|chi-square)' | sed 's/^/  /'
    ! grep -E 'WARN|ERROR' "$WORK"/{blk,rng}.log || die "the devices complain"
    echo "vmm: a guest of $(qemu-system-aarch64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/QEMU \1/p'), paused $pause times: ok"
}
