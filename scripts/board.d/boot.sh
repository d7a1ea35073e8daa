# Boots the board: QEMU's arm64 `virt` machine with virtualisation, Xen, dom0 and a payload disk.
# shellcheck shell=bash

# Xen's default scheduler, credit2, stands still under QEMU now and then (docs/board.md).
XEN_ARGS="sched=credit dom0_mem=768M dom0_max_vcpus=${DOM0_VCPUS:-1} console=dtuart dtuart=/pl011@9000000 loglvl=warning guest_loglvl=warning"
DOM0_ARGS='root=/dev/vda rw init=/init console=hvc0 quiet loglevel=4'
KERNEL_ADDRESS=0x50000000 INITRD_ADDRESS=0x58000000
MACHINE=(-machine "virt,virtualization=on,gic-version=3" -cpu cortex-a57 -smp 2 -m 2048)
# The longest silence, in seconds, of a console that is watched: until dom0 is up (as a rule that takes five seconds
# in all), and from then on where BOARD_HEARTBEAT says that dom0's payload says BOARD-ALIVE now and then.
SILENCE=${BOARD_SILENCE:-90}

# board_boot PAYLOAD_DIR [QEMU_OPTION...]: boots with the payload in dom0's /payload; dom0 runs /payload/main.
# Disks among the options come after the board's own. The console goes to standard output. Returns main's exit
# The board has the kernel BOARD_KERNEL, the initrd BOARD_INITRD and a disk of BOARD_ROOT's content where they are named, else its own
# without an initrd; dom0 may reboot where BOARD_REBOOTS says so. Returns main's exit
# status; 3 if the board ended without one, or not within BOARD_SECONDS; 4 if it stood still. A board that stands
# still before dom0 is up is booted once more.
board_boot() {
    local status=0
    boot_once "$@" || status=$?
    [ $status = 4 ] && ! grep -q '^BOARD-UP' "$WORK/boot/console" || return $status
    say "Booting once more"
    boot_once "$@"
}

boot_once() {
    local payload=$1 work=$WORK/boot kernel=${BOARD_KERNEL:-$(linux_dir)/Image} reboots=(-no-reboot) initrd=()
    shift
    [ -z "${BOARD_REBOOTS:-}" ] || reboots=()
    [ -z "${BOARD_INITRD:-}" ] || initrd=(-device "loader,file=$BOARD_INITRD,addr=$INITRD_ADDRESS,force-raw=on")
    rm -rf "$work" && mkdir "$work"
    tar -C "$payload" --mtime=@0 -cf "$work/payload.tar" .
    device_tree "$kernel" "$work/board.dtb"
    # Where a person types, Ctrl-C is for the shell in dom0.
    timeout --foreground "${BOARD_SECONDS:-600}" \
        qemu-system-aarch64 "${MACHINE[@]}" -accel tcg,thread=multi -nographic "${reboots[@]}" -nodefaults \
        -chardev stdio,id=console,signal="${BOARD_SIGNALS:-on}" -serial chardev:console -pidfile "$work/qemu.pid" \
        -monitor unix:"$work/monitor",server=on,wait=off \
        -kernel "$XEN_FILE" -dtb "$work/board.dtb" \
        -device loader,file="$kernel",addr=$KERNEL_ADDRESS,force-raw=on "${initrd[@]}" \
        -drive if=none,id=root,file="${BOARD_ROOT:-$(dom0_dir)/root.ext4}",format=raw,snapshot=on \
        -drive if=none,id=payload,file="$work/payload.tar",format=raw,readonly=on \
        "$@" -device virtio-blk-device,drive=payload -device virtio-blk-device,drive=root |
        tee "$work/console" | watch_board "$work"
    local status
    status=$(tr -d '\r' <"$work/console" | sed -n 's/^BOARD-EXIT //p' | tail -n1)
    [ -e "$work/stalled" ] && status=4
    return "${status:-3}"
}

# watch_board WORK: passes the console on. Ends a board that stands still, and says what is known of it.
watch_board() {
    local line status before now
    while true; do
        status=0
        IFS= read -r -t $SILENCE line || status=$?
        # A read that times out fails with more than 128.
        if [ $status -gt 128 ]; then
            before=$(qemu_ticks "$1") && sleep 5 && now=$(qemu_ticks "$1") || continue
            : >"$1/stalled"
            stalled "$1" $((now - before))
            kill "$(cat "$1/qemu.pid")" 2>/dev/null || true
            continue
        fi
        [ $status = 0 ] || { printf '%s' "$line"; break; }
        printf '%s\n' "$line"
        # A shell, or what measures, may be silent for long.
        case $line in BOARD-UP*) [ -n "${BOARD_HEARTBEAT:-}" ] || exec cat ;; esac
    done
}

# Ticks of 10 ms of processor time that QEMU has used; fails when it has ended.
qemu_ticks() { awk '{ print $14 + $15 }' "/proc/$(cat "$1/qemu.pid" 2>/dev/null)/stat" 2>/dev/null; }

# stalled WORK TICKS: QEMU used TICKS in the last five seconds.
stalled() {
    local how="crawls" step
    # An idle board takes a few percent; one that works takes a processor.
    [ "$2" -lt 50 ] && how="stands still: a wake-up was lost in Xen or QEMU (docs/board.md)"
    step=$(tr -d '\r' <"$1/console" | grep -a . | tail -n1)
    say "The board $how. It has said nothing for $SILENCE s; QEMU used $(($2 / 5)) % of a processor;" \
        "the host's load is $(cut -d' ' -f1-3 /proc/loadavg) on $(nproc) processors. The last line was: ${step:-none}"
}

# device_tree IMAGE OUT: QEMU's own device tree, with the nodes that tell Xen where dom0's kernel is, and its initrd.
device_tree() {
    local image=$1 out=$2
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
            reg = <0x0 $KERNEL_ADDRESS 0x0 $(size_of "$image")>;
            bootargs = "$DOM0_ARGS";
        };
    };
};
DTS
        [ -z "${BOARD_INITRD:-}" ] || cat <<DTS
/ {
    chosen {
        module@58000000 {
            compatible = "multiboot,ramdisk", "multiboot,module";
            reg = <0x0 $INITRD_ADDRESS 0x0 $(size_of "$BOARD_INITRD")>;
        };
    };
};
DTS
    } | dtc -q -I dts -O dtb -o "$out"
}

size_of() { printf '0x%x' "$(stat -L -c %s "$1")"; }
