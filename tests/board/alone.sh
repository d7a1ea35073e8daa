# A guest of virtio alone: a disk as its root, an address by DHCP over dom0's bridge, entropy, a console for its kernel's messages, a shell over sockets. What the cases that have one share.
# shellcheck shell=bash

# MiB that a stream has.
mib=$(whole && echo 64 || echo 16)

# alone_begin: what there is to be in dom0 before such a guest.
alone_begin() {
    mount_net_tools
    { shared "$NET_TOOLS"; } | configure
    start_daemon
    fds=$(daemon_fds)
    ip link set lo up
    ip tuntap add dev tap1 mode tap
    bridge br0 10.8.0.2/24 tap1
    printf '%s\n' 'start 10.8.0.50' 'end 10.8.0.60' 'interface br0' 'lease_file /tmp/leases' 'opt subnet 255.255.255.0' >/tmp/udhcpd.conf
    : >/tmp/leases
    busybox udhcpd -f /tmp/udhcpd.conf >/tmp/udhcpd.log 2>&1 &
    dhcp=$!
}

# alone_end: takes that away, and sees that nothing is left.
alone_end() {
    kill $dhcp
    pkill iperf3 || true
    ip link del br0
    ip link del tap1
    nothing_left "$fds"
}

# alone_guest NAME GRANTS SCRIPT [XL_LINE...]: creates a guest, which runs SCRIPT.
alone_guest() {
    local name=$1 grants=$2 script=$3
    shift 3
    guest "$name" "$script" "memory = 192" "$(by_file "$name" <<DEVICES
[[device]]
type = 'blk'
path = '$NET_TOOLS'
read-only = true
grant-usage = $grants
[[device]]
type = 'net'
tap = 'tap1'
mac = '00:16:3e:00:00:01'
grant-usage = $grants
[[device]]
type = 'rng'
grant-usage = $grants
[[device]]
type = 'console'
log = '/tmp/alone.log'
grant-usage = $grants
[[device]]
type = 'vsock'
cid = 42
listen = '/tmp/alone.vsock'
grant-usage = $grants
DEVICES
)" "$@"
    sed -i 's/console=hvc0 quiet/console=hvc1 ignore_loglevel/' "/tmp/$name.cfg"
    rm -f /tmp/alone.log*
    create_by_file "$name"
    said "$name" 'guest: serves' 120 >/dev/null
    address=$(said "$name" 'guest: address 10.8.0.5[0-9]/24' | sed 's/.* \([0-9.]*\)\/24.*/\1/')
    note "grants $grants: $(in_guest 'uname -r; grep " / " /proc/mounts | tail -n1; ls /sys/bus/xen/devices; cat /sys/class/misc/hw_random/rng_current' | xargs), $address"
    [ -z "$(in_guest 'ls /sys/bus/xen/devices')" ] || fail "the guest has a PV device"
    has_said "$name" '\] guest: its kernel speaks' || fail "the guest's kernel does not speak by the console"
    ! grep -aq 'guest:' "$CONSOLES/guest-$name.log" || fail "the guest has spoken by Xen's console"
}

# All that the guest says it says by its device.
console() { tr -d '\r' </tmp/alone.log 2>/dev/null; }

# in_guest COMMANDS: what they say, in the guest, in 25 seconds at most; before that, the device says that the guest hears them.
in_guest() { printf 'CONNECT 7000\n%s\n' "$1" | chroot /net-tools /usr/bin/socat -t 25 - UNIX-CONNECT:/tmp/alone.vsock | tail -n +2; }

# streams HOW: so many MiB each way, checked, and what iperf3 makes of it.
streams() {
    local out in
    timeout 60 guest-io receive tcp-listen:5001 >/tmp/received &
    receiver=$!
    sleep 0.5
    in_guest "guest-io send tcp:10.8.0.2:5001 $mib" >/dev/null
    wait $receiver || fail "what the guest has sent has not arrived"
    (sleep 1; timeout 60 guest-io send tcp:"$address":5000 $mib >/dev/null) &
    in_guest 'guest-io receive tcp-listen:5000' | grep -q "received $mib MiB as sent" || fail "the guest has not received what was sent"
    rm -f /tmp/alone.vsock_5001
    timeout 60 guest-io receive unix-listen:/tmp/alone.vsock_5001 >/tmp/received &
    receiver=$!
    sleep 0.5
    in_guest "guest-io send vsock:2:5001 $mib" >/dev/null
    wait $receiver || fail "what the guest has sent over sockets has not arrived"
    out=$(iperf3 -c "$address" -t 1 -R -f m | awk '/receiver/ { print $7 / 8 }')
    in=$(iperf3 -c "$address" -t 1 -f m | awk '/receiver/ { print $7 / 8 }')
    note "$1: $mib MiB each way as sent, and out over sockets; iperf3 out ${out:?} MB/s, in ${in:?}"
}

# answers [BYTES]: whether the guest answers a ping within a second. The board's kernel has no timers for ping to give up by, or to send a second one by.
answers() {
    busybox ping -c 1 -s "${1:-56}" "$address" >/tmp/ping 2>&1 &
    local ping=$!
    sleep 1
    if kill $ping 2>/dev/null; then return 1; fi
    wait $ping
}

# pings: the guest and dom0 ask each other, in fragments.
pings() {
    wait_for 20 "the guest to answer a large ping" answers 64000
    note "$(grep '64008 bytes from' /tmp/ping)"
    note "the guest: $(in_guest 'busybox ping -c 1 -s 64000 10.8.0.2' | grep '64008 bytes from')"
}

# load: a stream to the guest for twenty seconds.
load() { timeout 60 chroot /net-tools iperf3 -c "$address" -t 20 >/dev/null 2>&1 || true; }

# suspends NAME TIMES: the guest suspends as often, as far as its devices and back (pm_test: nothing need wake it), in a stream that outlives it; a connection to a socket of its does not.
suspends() {
    local name=$1 times=$2 i open
    timeout 240 guest-io receive tcp-listen:5001 >/tmp/received &
    receiver=$!
    sleep 0.5
    in_guest "echo devices >/sys/power/pm_test; guest-io send tcp:10.8.0.2:5001 $((4 * mib)) >/dev/null 2>&1 &" >/dev/null
    for ((i = 1; i <= times; i++)); do
        in_guest 'sleep 90' >/dev/null &
        open=$!
        in_guest "(sleep 1; echo freeze >/sys/power/state && echo guest: resumed $i || echo guest: FAIL suspend) >/dev/kmsg 2>&1 </dev/null &" >/dev/null
        said "$name" "guest: resumed $i\$" >/dev/null
        ended() { ! kill -0 $open 2>/dev/null; }
        wait_for 10 "a connection to end that was open when its guest suspended" ended
    done
    wait $receiver || fail "the stream has not outlived the suspends: $(cat /tmp/received)"
    wait_for 20 "the guest to answer again" answers
    note "suspended $times times: $(tail -n1 /tmp/received)"
    note "$(in_guest 'head -c 65536 /dev/hwrng | wc -c') bytes of entropy, $(in_guest 'head -c 16777216 /dev/vda | wc -c') of the disk"
}
