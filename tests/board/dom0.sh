# What the board's cases do in dom0. Sourced by bash there, in /payload.
# shellcheck shell=bash
export PATH=/payload/bin:$PATH
CONSOLES=/var/log/xen/console
DAEMON_LOG=/tmp/xen-virtiod.log
BACK_END_LOGS=/var/log/back-ends
# Why a case has failed.
WHY=/run/why

# timeout SECONDS COMMAND...: as the program of this name, which wants timers that the board's kernel has not.
timeout() {
    local limit=$1 command killer status=0
    shift
    "$@" <&0 &
    command=$!
    (sleep "$limit" && kill $command) >/dev/null 2>&1 &
    killer=$!
    wait $command || status=$?
    kill $killer 2>/dev/null || true
    return $status
}

say() { echo "==> $*"; }
note() { echo "  $*"; }
# fail WHY: ends the case, also where only a command substitution or a process beside the case would end.
fail() {
    echo "FAIL: $*" | tee -a $WHY >&2
    [ "${CASE:-$BASHPID}" = "$BASHPID" ] || kill "$CASE"
    exit 1
}

# whole: the case is to show all that it can; else what no other one shows, since CI waits for it.
whole() { [ -n "$WHOLE" ]; }

# needs_libxl VERSION: skips a case that needs what an older libxl lacks.
needs_libxl() {
    [ "$(printf '%s\n' "$1" "$XEN_VERSION" | sort -V | head -n1)" = "$1" ] || { echo "SKIP: needs libxl $1"; exit 77; }
}
[ "$XEN_VERSION" != 4.17 ] || . ./libxl-4.17.sh

# is_within SECONDS COMMAND...: waits until COMMAND succeeds; fails if it does not.
is_within() {
    local limit=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $limit ] || return 1
        sleep 0.1
    done
}
# wait_for SECONDS WHAT COMMAND...: the same, and the case fails.
wait_for() { is_within "$1" "${@:3}" || fail "waited too long for $2"; }

start_daemon() {
    XEN_VIRTIOD_LOG=${LOG_LEVEL:-info} xen-virtiod >>$DAEMON_LOG 2>&1 &
    DAEMON=$!
    wait_for 10 "xen-virtiod to be ready" grep -q 'ready:' $DAEMON_LOG
}

# As systemd does, when it has ended.
restart_daemon() {
    wait "$DAEMON" 2>/dev/null || true
    : >$DAEMON_LOG
    start_daemon
}

# make_disk PATH MIB: a disk of noise that is quick to make.
make_disk() {
    noise "$2" >"$1"
}

# Noise without a noise source's cost under emulation: 1 MiB of it, shifted by a byte for each repetition.
noise() {
    [ -f /tmp/noise ] || head -c 1M /dev/urandom >/tmp/noise
    local i
    for ((i = 1; i <= $1; i++)); do tail -c +$((i + 1)) /tmp/noise; head -c "$i" /tmp/noise; done
}

# disk PATH [GRANT_USAGE [VDEV]]: the xl disk line for xen-virtiod.
disk() { echo "'backendtype=standalone, specification=virtio, grant_usage=${2:-1}, vdev=${3:-xvda}, access=rw, target=$1'"; }

# guest NAME SCRIPT [XL_LINE...]: writes /tmp/NAME.cfg for a guest that runs tests/board/guest/SCRIPT.
guest() {
    local name=$1 script=$2
    shift 2
    {
        echo "name = '$name'"
        echo "kernel = '/payload/Image'"
        echo "ramdisk = '/payload/guest.cpio.gz'"
        echo "memory = 128"
        echo "vcpus = 1"
        echo "extra = 'console=hvc0 quiet GUEST=$script'"
        echo "on_crash = 'destroy'"
        printf '%s\n' "$@"
    } >"/tmp/$name.cfg"
}

# by_file NAME: gives the guest the devices on standard input by a file of ours; prints the xl lines that it needs then.
by_file() {
    mkdir -p /etc/xen-virtiod/guests
    cat >"/etc/xen-virtiod/guests/$1.toml"
    xen-virtioctl device-tree "$1" | dtc -q -I dts -O dtb -o "/tmp/$1.dtb" || fail "the device tree of $1"
    echo "device_tree = '/tmp/$1.dtb'"
    # Before Xen 4.19 this is what brings shared interrupts.
    [ "$XEN_VERSION" = 4.17 ] && echo "vuart = 'sbsa_uart'" || echo "nr_spis = 16"
}
# create_by_file NAME: creates such a guest, which the service lets run when its devices are there.
create_by_file() {
    command xl create -q "/tmp/$1.cfg" || fail "xl create $1" || return
    xen-virtioctl wait --timeout 10 "$1" >/dev/null || fail "the devices of $1 are not served: xen-virtioctl list"
}

# Whether the last of the disks that came with the board's own is that of back-ends, and not another one's tools.
has_back_ends() {
    local label
    for label in net-tools fio prometheus; do
        [ -b /dev/vdc ] && [ "$(findfs LABEL=$label 2>/dev/null)" != /dev/vdc ] || return 1
    done
}
# The programs of scripts/board.d/back_ends.sh, in a root of their own that shares /run and /tmp.
mount_back_ends() {
    mountpoint -q /back-ends && return
    has_back_ends || { echo "SKIP: the back-ends could not be fetched"; exit 77; }
    # What bash needs for the pipes of back_end.
    [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
    mkdir -p /back-ends
    mount /dev/vdc /back-ends
    local dir
    for dir in dev proc sys run tmp; do mount --bind /$dir /back-ends/$dir; done
}
# The network's tools (scripts/board.d/net_tools.sh), in a root of their own; NET_TOOLS is the disk that they are on, which a
# guest may have read-only.
mount_net_tools() {
    NET_TOOLS=$(findfs LABEL=net-tools 2>/dev/null) || { echo "SKIP: the network's tools could not be fetched"; exit 77; }
    mountpoint -q /net-tools && return
    mkdir -p /net-tools
    mount -o ro "$NET_TOOLS" /net-tools
    local dir
    for dir in dev dev/pts proc sys run tmp; do mount --bind /$dir /net-tools/$dir; done
}
# mount_fio: FIO is the disk that fio is on (scripts/board.d/fio.sh), which a guest may have read-only.
mount_fio() { FIO=$(findfs LABEL=fio 2>/dev/null) || { echo "SKIP: fio could not be fetched"; exit 77; }; }
# mount_prometheus: Prometheus and promtool (scripts/board.d/prometheus.sh), in a root of their own.
mount_prometheus() {
    local disk
    disk=$(findfs LABEL=prometheus 2>/dev/null) || { echo "SKIP: Prometheus could not be fetched"; exit 77; }
    mountpoint -q /prometheus && return
    mkdir -p /prometheus
    mount -o ro "$disk" /prometheus
    local dir
    for dir in dev proc run tmp; do mount --bind /$dir /prometheus/$dir; done
}
ip() { chroot /net-tools /usr/sbin/ip "$@"; }
iperf3() { chroot /net-tools /usr/bin/iperf3 "$@"; }
# has_debian_kernel: skips the case where Debian's kernel is not in /payload/debian.
has_debian_kernel() { [ -f /payload/debian/vmlinuz ] || { echo "SKIP: Debian's kernel could not be fetched"; exit 77; }; }
# bridge NAME ADDRESS/LENGTH [INTERFACE...]: a bridge of dom0's with this address, and with these interfaces.
bridge() {
    local name=$1 interface
    ip link show "$name" >/dev/null 2>&1 || ip link add "$name" type bridge
    ip addr replace "$2" dev "$name"
    ip link set "$name" up
    for interface in "${@:3}"; do
        ip link set "$interface" master "$name" up
    done
}

# back_end NAME COMMAND...: starts one, whose number is BACK_END then. Its output is a pipe: one of them polls that.
back_end() {
    local name=$1
    shift
    mkdir -p $BACK_END_LOGS
    chroot /back-ends "$@" > >(cat >>"$BACK_END_LOGS/$name.log") 2>&1 &
    BACK_END=$!
}
# begin_streams MIB: what guests/net talks to; sets RECEIVER and ANSWERS to the processes that receive and answer.
begin_streams() {
    timeout 100 guest-io send tcp-listen:5000 "$1" >/dev/null &
    timeout 100 guest-io receive tcp-listen:5001 >/tmp/received &
    RECEIVER=$!
    guest-io answer 5002 &
    ANSWERS=$!
}
# end_streams NAME MIB: when the guest has sent what it has, and been answered.
end_streams() {
    note "$(said "$1" "stream: sent $2 MiB" 60)"
    wait $RECEIVER || fail "what the guest has sent has not arrived"
    note "dom0: $(tail -n1 /tmp/received)"
    note "$(said "$1" 'datagrams: 5 questions answered' 30)"
    kill $ANSWERS
}
is_socket() { [ -S "$1" ]; }
# sees_only_ours PID: the back-end maps the memory that it shares with a worker, and has nothing of Xen's or the guest's.
sees_only_ours() {
    grep -q memfd:xen-virtio-shadow "/proc/$1/maps" || fail "process $1 does not map the shared memory"
    local seen
    seen=$(awk '$6 ~ /memfd|\/dev\/|xen/ { print $6 }' "/proc/$1/maps"; ls -l "/proc/$1/fd" | sed -n 's/.* -> //p')
    seen=$(grep -E 'xen|gnt|memfd|/dev/' <<<"$seen" | grep -vE '^/memfd:xen-virtio-shadow|^/dev/(null|urandom)$|back-ends' | sort -u) || true
    [ -z "$seen" ] || fail "process $1 has more than it needs: $seen"
}

create() { xl create -q "/tmp/$1.cfg" || fail "xl create $1"; }
console() { tr -d '\r' <"$CONSOLES/guest-$1.log" 2>/dev/null; }
has_said() { console "$1" | grep -qaE "$2"; }
domid() { xl domid "$1" 2>/dev/null; }
is_gone() { ! xl list "$1" >/dev/null 2>&1; }
pids_of() { pgrep -f "xen-virtiod worker $1\$"; }
# Whether guest $name has another worker than $worker, which was killed.
has_worker() { local now; now=$(pids_of "$(domid "$name")") && [ "$now" != "$worker" ]; }

# said NAME PATTERN [SECONDS]: waits until the guest's console shows a line that matches; prints it.
said() {
    local limit=$((SECONDS + ${3:-60}))
    until has_said "$1" "$2"; do
        [ $SECONDS -lt $limit ] || fail "guest $1 did not say '$2'"
        is_well "$1"
        sleep 0.2
    done
    console "$1" | grep -aE "$2" | tail -n1
}

# is_well NAME: fails with what the guest complains of, if it does.
is_well() {
    local complaint
    complaint=$(console "$1" | grep -am1 -E 'guest: FAIL|Kernel panic|Unable to handle kernel') || return 0
    fail "guest $1: $complaint"
}

# count_said NAME PATTERN: how many lines of the guest's console match.
count_said() { console "$1" | grep -caE "$2" || true; }

# verifies_on NAME [SECONDS]: waits until the guest, which runs guest/verify, has verified more of its disks.
verifies_on() {
    local before
    before=$(count_said "$1" 'verifying:')
    wait_for "${2:-60}" "guest $1 to go on verifying" said_more_than "$1" $((before + 1))
    has_said "$1" 'guest: FAIL|guest: done|I/O error' && fail "guest $1: $(console "$1" | tail -n 5)"
    return 0
}
said_more_than() { [ "$(count_said "$1" 'verifying:')" -gt "$2" ]; }
# longest_pause NAME [LINE]: of the guest's verified disk, in milliseconds, since line LINE of what it said of it.
longest_pause() { console "$1" | sed -n 's/.*longest pause \([0-9]*\) ms/\1/p' | tail -n +$((${2:-0} + 1)) | sort -n | tail -n 1; }

# Guests whose script has ended are destroyed by us: what a toolstack does.
destroy() {
    xl destroy "$1" || fail "xl destroy $1"
    wait_for 20 "guest $1 to be gone" is_gone "$1"
}

# close_disk NAME [TIMES]: closes the guest's xvda, as libxl does, and waits until its worker has given it up.
close_disk() {
    local state i
    state=backend/virtio_disk/$(domid "$1")/51712/state
    for ((i = 0; i < ${2:-1}; i++)); do xenstore-write "$state" 5; done
    wait_for 5 "the disk of $1 to be closed" is_closed "$state"
}
is_closed() { [ "$(xenstore-read "$1")" = 6 ]; }

# report FIELD: a number of `xen-virtioctl list --json`, summed over all devices.
report() { xen-virtioctl list --json | awk -v field="\"$1\":" '$1 == field { sum += $2 } END { print sum + 0 }'; }

no_worker() { [ -z "$(pids_of '[0-9]+')" ]; }
# A destroyed domain of which dom0 still has a page stays as a zombie without a name.
no_zombie() { ! xl list | awk 'NR > 1 { print $1 }' | grep -qa '(null)\|^$'; }
daemon_fds() { ls /proc/"$DAEMON"/fd | wc -l; }

# mapped PID DEVICE: pages of /dev/xen/DEVICE in a process's memory.
mapped() {
    awk -v device="/dev/xen/$2" '$6 == device {
        split($1, ends, "-"); pages += (strtonum("0x" ends[2]) - strtonum("0x" ends[1])) / 4096
    } END { print pages + 0 }' "/proc/$1/maps"
}

# nothing_left FDS: no worker, no zombie domain, no descriptor more than before.
nothing_left() {
    wait_for 10 "the workers to end" no_worker
    wait_for 10 "dead domains to go" no_zombie
    # Connections to back-ends are closed a little later.
    local limit=$((SECONDS + 5))
    until [ "$(daemon_fds)" = "$1" ]; do
        [ $SECONDS -lt $limit ] || fail "xen-virtiod has $(daemon_fds) descriptors instead of $1: $(ls -l /proc/$DAEMON/fd)"
        sleep 0.2
    done
}

run_case() {
    rm -f $WHY
    (
        CASE=$BASHPID
        trap 'exit 1' TERM
        set -eE
        trap 'echo "FAIL: ${BASH_COMMAND} (line ${LINENO})" | tee -a $WHY' ERR
        . "./cases/$1.sh"
    )
    local status=$?
    [ $status != 77 ] || return 77
    if [ -d /run/systemd/system ]; then
        [ $status != "$AGAIN" ] || return "$AGAIN"
        journal >$DAEMON_LOG
    fi
    if grep -q 'panicked' $DAEMON_LOG 2>/dev/null; then
        echo "FAIL: a process of xen-virtiod panicked"
        status=1
    fi
    if [ $status = 0 ]; then
        echo "PASS: $1"
    else
        echo "--- xen-virtiod:"
        cat $DAEMON_LOG
        xen-virtioctl list
        xl list
        for log in $BACK_END_LOGS/*.log "$CONSOLES"/*.log /tmp/alone.log; do [ ! -f "$log" ] || { echo "--- $log:" && tail -n 30 "$log"; }; done
        dmesg | tail -n 15
        # Once more at the end, which is what is shown where there is no room for all.
        cat $WHY
    fi
    return $status
}

# run_cases CASE...: one after the other; the marks are for whoever reads the console.
run_cases() {
    local case outcome status failed=0 heart
    while sleep 5; do echo BOARD-ALIVE; done &
    heart=$!
    for case; do
        echo "CASE-BEGIN $case"
        SECONDS=0 outcome=ok
        # Before `||`, bash would let its failed commands pass, `set -e` or not.
        run_case "$case"
        status=$?
        case $status in
            0) ;;
            77) outcome=skipped ;;
            *) outcome=FAILED failed=1 ;;
        esac
        echo "CASE-END $case $outcome $SECONDS"
        clean_up
    done
    kill $heart
    return $failed
}

# What a case leaves behind, whichever way it ended, is not the next one's.
clean_up() {
    pkill -KILL xen-virtiod || true
    # Also the keepers of programs, and these; and what runs in the back-ends' root.
    pkill -KILL -f /back-ends || true
    local process interface
    for process in /proc/[0-9]*; do
        case $(readlink "$process/root") in /back-ends | /net-tools) kill -KILL "${process#/proc/}" ;; esac
    done
    # dom0 itself has no interface but the first.
    for interface in /sys/class/net/*; do
        ! mountpoint -q /net-tools || [ "${interface##*/}" = lo ] || ip link del "${interface##*/}" 2>/dev/null || true
    done
    xl list | awk 'NR > 1 && $1 != "Domain-0" { print $2 }' | while read -r domain; do xl destroy "$domain"; done
    wait_for 20 "dead domains to go" no_zombie
    xenstore-rm backend/virtio_disk backend/virtio_file
    # One that is suspended holds up whoever has it.
    dmsetup ls | while read -r table _; do dmsetup --noudevsync resume "$table"; done
    dmsetup --noudevsync remove_all
    losetup --detach-all
    rm -rf /tmp/* /etc/xen-virtiod /run/xen-virtiod "$CONSOLES"/guest-*
} >/dev/null 2>&1

run_demo() {
    say "dom0 is up: $(xl info | awk '/^xen_version/ { print "Xen " $3 }'), Linux $(uname -r)"
    start_daemon
    say "xen-virtiod runs; making a disk of 96 MiB"
    make_disk /tmp/disk.img 96
    guest demo disk "disk = [ $(disk /tmp/disk.img) ]"
    sed 's/^/  /' /tmp/demo.cfg
    if [ "$XEN_VERSION" = 4.17 ]; then
        say "xl create demo.cfg, with what xl of Xen 4.17 lacks (grant_usage) done by hand: tests/board/libxl-4.17.sh"
    else
        say "xl create demo.cfg"
    fi
    create demo
    wait_for 10 "the guest's console" test -f "$CONSOLES/guest-demo.log"
    tail -n +1 -f "$CONSOLES/guest-demo.log" | sed -u 's/\r//g; s/^/[guest] /' &
    (said demo 'guest: done' 120 && is_well demo) >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
    say "xen-virtioctl list"
    xen-virtioctl list | sed 's/^/  /'
    destroy demo
    say "the guest is gone; fsck in dom0"
    e2fsck -fn /tmp/disk.img 2>/dev/null | sed 's/^/  /'
    say "done: a guest has made a file system on its disk, written it, and verified it"
}

run_shell() {
    start_daemon
    make_disk /tmp/disk.img 64
    guest demo shell "disk = [ $(disk /tmp/disk.img) ]"
    cat <<HELP
xen-virtiod runs on Xen $XEN_VERSION; its log is $DAEMON_LOG. This shell has the functions of tests/board/dom0.sh:
  create demo && xl console demo      a guest by /tmp/demo.cfg, which has a disk, and a shell in it; Ctrl-] leaves that
  destroy demo
  guest g shell "\$(by_file g)"        a guest with the devices of a file, which is typed then and ends with Ctrl-D
  create_by_file g && xl console g
HELP
    if findfs LABEL=net-tools >/dev/null 2>&1; then
        mount_net_tools
        echo "  ip …, chroot /net-tools COMMAND    ip, iperf3, ethtool, socat, tmux; /run and /tmp are dom0's"
    fi
    if has_back_ends; then
        mount_back_ends
        echo "  chroot /back-ends COMMAND          virtiofsd (/usr/libexec), qemu-storage-daemon, passt, …"
    fi
    cat >/tmp/shell.rc <<RC
XEN_VERSION=$XEN_VERSION WHOLE=
cd /payload && . ./dom0.sh && cd /
fail() { echo "FAIL: \$*" >&2; return 1; }
PS1='dom0# '
RC
    setsid -c bash --rcfile /tmp/shell.rc -i
}

# What xl runs for a PV disk, in place of Xen's own hotplug scripts, which want udev.
write_pv_hotplug() {
    cat >/tmp/pv-hotplug <<'HOTPLUG'
#!/bin/bash
export PATH=/usr/sbin:/usr/bin
[ "$1" = add ] || exit 0
disk=$(xenstore-read "$XENBUS_PATH/params")
# Its major and minor numbers, in hexadecimal.
xenstore-write "$XENBUS_PATH/physical-device" "$(stat -c %t:%T "$disk")" "$XENBUS_PATH/physical-device-path" "$disk" \
    "$XENBUS_PATH/hotplug-status" connected
HOTPLUG
    chmod +x /tmp/pv-hotplug
}

# three_disks PATH [DISK]: the xl line for a block device three times, as a PV disk, with grants and with frames; and DISK.
three_disks() {
    echo "disk = [ 'script=/tmp/pv-hotplug, vdev=xvda, access=rw, target=$1'," \
        "$(disk "$1" 1 xvdb), $(disk "$1" 0 xvdc)${2:+, $2} ]"
}

# stop_daemon and its workers, so that the next one reads another configuration.
stop_daemon() {
    kill "$DAEMON"
    wait "$DAEMON" 2>/dev/null
    wait_for 5 "the workers to end" no_worker
}

# configure: writes the service's configuration, which is read when it starts.
configure() {
    mkdir -p /etc/xen-virtiod
    cat >/etc/xen-virtiod/config.toml
}
polling() { printf '[polling]\nlimit-us = %s\n' "$1" | configure; }
# shared PATH: for disks that are meant to have several users.
shared() { printf '[[disk]]\npath = "%s"\nshared = true\n' "$1"; }

# bench NAME PATTERNS RUNS SECONDS DISKS XL_LINE [CREATE]: a guest that measures its disks, which is left running.
bench() {
    guest "$1" bench "$6"
    sed -i "s/GUEST=bench/& PATTERNS=$2 RUNS=$3 SECS=$4 DISKS=$5/" "/tmp/$1.cfg"
    "${7:-create}" "$1"
    # Nothing looks meanwhile: that would take dom0's processor from what is measured.
    local patterns=${2//[!,]/} disks=${5//[!,]/}
    sleep "$(awk -v patterns=$((${#patterns} + 1)) -v disks=$((${#disks} + 1)) -v runs="$3" -v seconds="$4" \
        'BEGIN { print 1 + patterns * disks * runs * (seconds + 0.25) }')"
    said "$1" 'guest: done' 400 >/dev/null
    is_well "$1"
}

# counts: what the only device has counted, a line of `NAME VALUE` pairs.
counts() {
    local field
    for field in requests traps kicks interrupts copy_batches copy_segments submissions copy_in_ns submit_ns \
        copy_out_ns sleeps syscalls cpu_ns polled_ns; do
        echo -n " $field $(report $field)"
    done
    echo
}

run_bench() {
    local patterns=4k-qd1-randread,4k-qd4-randread,4k-qd16-randread,4k-qd64-randread,4k-qd1-randwrite
    patterns+=,4k-qd4-randwrite,4k-qd16-randwrite,4k-qd64-randwrite,64k-qd4-read,64k-qd4-write,1m-qd2-read,1m-qd2-write
    local some=4k-qd1-randread,4k-qd16-randread,4k-qd16-randwrite pattern limit three
    make_disk /tmp/disk.img 128
    losetup /dev/loop0 /tmp/disk.img
    write_pv_hotplug
    three=$(three_disks /dev/loop0)
    for limit in 1000 0; do
        { shared /dev/loop0; printf '[polling]\nlimit-us = %s\n' $limit; } | configure
        start_daemon
        say "one guest with three disks on one loop device, polling for at most $limit us"
        bench "bench$limit" "$patterns" "${BENCH_RUNS:-5}" 0.5 xvda,vda,vdb "$three"
        console "bench$limit" | sed -n "s/^bench /  bench $limit /p"
        destroy "bench$limit"
        patterns=$some
        for pattern in ${some//,/ }; do
            bench "$pattern$limit" "$pattern" 1 3 vda "disk = [ $(disk /dev/loop0) ]"
            echo "  counts $limit $pattern$(counts)"
            destroy "$pattern$limit"
        done
        stop_daemon
    done
    ! has_back_ends || bench_back_end
}

# Our own disk and qemu-storage-daemon's on the same loop device, in one guest.
bench_back_end() {
    local patterns=4k-qd1-randread,4k-qd16-randread,4k-qd16-randwrite,64k-qd4-read,64k-qd4-write worker
    say "one guest with two disks on one loop device: our own, and qemu-storage-daemon's; dom0 has $(nproc) processor(s)"
    mount_back_ends
    shared /dev/loop0 | configure
    start_daemon
    back_end storage qemu-storage-daemon \
        --blockdev driver=host_device,node-name=disk,filename=/dev/loop0,cache.direct=on,aio=io_uring,locking=off \
        --export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=/run/storage.sock,writable=on
    wait_for 20 "qemu-storage-daemon" is_socket /run/storage.sock
    bench remote "$patterns" "${BENCH_RUNS:-5}" 0.5 vda,vdb "$(by_file remote <<'DEVICES'
[[device]]
type = 'blk'
path = '/dev/loop0'
[[device]]
type = 'blk'
socket = '/run/storage.sock'
DEVICES
)" create_by_file
    console remote | sed -n "s/^bench /  back-end /p"
    worker=$(pids_of "$(domid remote)")
    echo "  back-end memory worker $(resident "$worker") back-end $(resident $BACK_END) shared" \
        "$(awk '/memfd:xen-virtio-shadow/ { split($1, ends, "-"); print (strtonum("0x" ends[2]) - strtonum("0x" ends[1])) / 1024 }' "/proc/$worker/maps")"
    destroy remote
}

run_fio() {
    local patterns=4k-qd1-randread,4k-qd16-randread,4k-qd16-randwrite,64k-qd4-read
    make_disk /tmp/disk.img 128
    losetup /dev/loop0 /tmp/disk.img
    write_pv_hotplug
    shared /dev/loop0 | configure
    start_daemon
    mount_fio
    guest fio fio "memory = 384" "$(three_disks /dev/loop0 "$(disk "$FIO" 1 xvdd)")"
    sed -i "s/GUEST=fio/& TOOLS=vdc PATTERNS=$patterns RUNS=${BENCH_RUNS:-3} SECS=2 DISKS=xvda,vda,vdb/" /tmp/fio.cfg
    say "one guest with three disks on one loop device, polling for at most 1000 us"
    create fio
    sleep $((40 * ${BENCH_RUNS:-3}))
    said fio 'guest: done' 400 >/dev/null
    is_well fio
    console fio | sed -n 's/^bench /  bench 1000 /p'
    destroy fio
}

# The processor time that dom0 has used, in milliseconds: the kernel's and the back-ends' too.
dom0_time() { xl list Domain-0 | awk 'END { print int($6 * 1000) }'; }

# measure_net NAME ADDRESS: prints `net NAME PATTERN RATE DOM0-MS` for each pattern; who is at ADDRESS runs guest/net-bench.
measure_net() {
    local name=$1 address=$2 pattern rate before seconds=2
    for pattern in ${3:-tcp-out tcp-in udp64-out udp64-in round-trips}; do
        before=$(dom0_time)
        rate=$(case $pattern in
            tcp-out) iperf3 -c "$address" -t $seconds -R -f k | awk '/receiver/ { print $7 / 8 }' ;;
            tcp-in) iperf3 -c "$address" -t $seconds -f k | awk '/receiver/ { print $7 / 8 }' ;;
            udp64-out) iperf3 -c "$address" -t $seconds -u -b 0 -l 64 -R -f k | received_packets $seconds ;;
            udp64-in) iperf3 -c "$address" -t $seconds -u -b 0 -l 64 -f k | received_packets $seconds ;;
            round-trips) guest-io trips "$address:7" $seconds | awk '{ print $3 }' ;;
        esac)
        echo "  net $name $pattern ${rate:-0} $(($(dom0_time) - before))"
    done
}
# received_packets SECONDS: a second's, of what iperf3 says.
received_packets() { awk -v s="$1" '/receiver/ { split($0, a, /[()]/); n = split(a[1], b, " "); split(b[n], c, "/"); print int((c[2] - c[1]) / s) }'; }

# One guest with a PV interface, ours by grants and by frames, and vhost-net's, each on a bridge of its own.
run_net() {
    local run limit number=1 devices='' name
    mount_net_tools
    bridge pv 10.9.1.2/24
    for name in grants frames vhost; do
        number=$((number + 1))
        ip tuntap add dev "t$name" mode tap
        bridge "b$name" "10.9.$number.2/24" "t$name"
        devices+="[[device]]
type = 'net'
tap = 't$name'
mac = '00:16:3e:00:00:0$number'
grant-usage = $([ $name = frames ] && echo false || echo true)
$([ $name != vhost ] || echo 'vhost = true')
"
    done
    cat >/tmp/vif-hotplug <<'HOTPLUG'
#!/bin/bash
export PATH=/usr/sbin:/usr/bin
[ "$1" = online ] || exit 0
chroot /net-tools /usr/sbin/ip link set "$vif" master pv up
xenstore-write "$XENBUS_PATH/hotplug-status" connected
HOTPLUG
    chmod +x /tmp/vif-hotplug
    for limit in 1000 0; do
        { shared "$NET_TOOLS"; printf '[polling]\nlimit-us = %s\n' $limit; } | configure
        start_daemon
        guest net net-bench "vif = [ 'mac=00:16:3e:00:00:01, script=/tmp/vif-hotplug' ]" "$(by_file net <<<"$devices
[[device]]
type = 'blk'
path = '$NET_TOOLS'
read-only = true")"
        create_by_file net
        said net 'guest: ready' 60 >/dev/null
        say "one guest with four interfaces, polling for at most $limit us; dom0 has $(nproc) processor(s)"
        for ((run = 0; run < ${BENCH_RUNS:-5}; run++)); do
            number=0
            for name in pv grants frames vhost; do
                number=$((number + 1))
                measure_net "$limit $name" "10.9.$number.1"
            done
        done
        is_well net
        destroy net
        stop_daemon
    done
}

context_switches() { awk '/ctxt_switches/ { sum += $2 } END { print sum }' "/proc/$1/status"; }
resident() { awk '/^VmRSS/ { print $2 }' "/proc/$1/status"; }
all_said() {
    local name
    for name; do has_said "$name" 'guest: done' || return 1; done
}

# scale_guest NUMBER SCRIPT MIB: a guest with a disk, a network device and a console.
scale_guest() {
    make_disk "/tmp/disk$1.img" "$3"
    ip tuntap add dev "s$1" mode tap
    bridge scale 10.7.0.1/24 "s$1"
    guest "g$1" "$2" "memory = 64" "$(by_file "g$1" <<DEVICES
[[device]]
type = 'blk'
path = '/tmp/disk$1.img'
[[device]]
type = 'net'
tap = 's$1'
mac = '00:16:3e:00:01:$(printf '%02x' "$1")'
[[device]]
type = 'console'
log = '/tmp/g$1.log'
DEVICES
)"
}

# 1, 4 and 16 guests, the first of them busy: what each process takes.
run_scale() {
    local guests=() idle=() index count before after worker largest
    mount_net_tools
    start_daemon
    # What dom0 says of itself wakes everybody.
    echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
    echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
    scale_guest 1 bench 64
    sed -i 's/GUEST=bench/& PATTERNS=4k-qd4-randread RUNS=1 SECS=300 DISKS=vda/' /tmp/g1.cfg
    create_by_file g1
    for count in 1 4 16; do
        for ((index = ${#idle[@]} + 2; index <= count; index++)); do
            scale_guest "$index" idle-network 4
            create_by_file "g$index"
            idle+=("g$index")
        done
        wait_for 120 "$count guests to be up" all_said "${idle[@]}"
        sleep 2
        guests=()
        for index in "${idle[@]}"; do guests+=("$(pids_of "$(domid "$index")")"); done
        before=0 after=0
        for worker in "${guests[@]}"; do before=$((before + $(context_switches "$worker"))); done
        sleep 10
        for worker in "${guests[@]}"; do after=$((after + $(context_switches "$worker"))); done
        worker=$(pids_of "$(domid g1)")
        largest=$(for worker in "$worker" "${guests[@]}"; do resident "$worker"; done | sort -n | tail -n1)
        note "guests: $count; supervisor $(resident $DAEMON) KiB, largest worker $largest KiB;" \
            "$((after - before)) wake-ups of ${#idle[@]} idle workers in 10 s; pages claimed after" \
            "$(xen-virtioctl list --json | awk '$1 == "\"claimed_after_ms\":" { print $2 + 0 }' | sort -n | tail -n1) ms at most"
        [ "$largest" -le 6144 ] || fail "a worker takes more than 6 MiB"
        [ "$after" = "$before" ] || fail "idle workers wake up"
    done
}

run_copy_or_map() { guest-io grants | sed 's/^/  /'; }
