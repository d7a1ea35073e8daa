# A guest of virtio alone: a disk as its root, an address by DHCP over dom0's bridge, entropy, a console for its kernel's messages, a shell over sockets. Streams both ways with offloads and without; its driver comes and goes, its worker dies.
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
# in_guest COMMANDS: what they say, in the guest, in 25 seconds at most; before that, the device says that the guest hears them.
in_guest() { printf 'CONNECT 7000\n%s\n' "$1" | chroot /net-tools /usr/bin/socat -t 25 - UNIX-CONNECT:/tmp/alone.vsock | tail -n +2; }
mib=$(whole && echo 64 || echo 16)
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
    out=$(iperf3 -c "$address" -t 1 -R -f m | awk '/receiver/ { print $7 / 8 }')
    in=$(iperf3 -c "$address" -t 1 -f m | awk '/receiver/ { print $7 / 8 }')
    note "$1: $mib MiB each way as sent; iperf3 out ${out:?} MB/s, in ${in:?}"
}
link_is() { [ "$(in_guest 'cat /sys/class/net/eth0/carrier')" = "$1" ]; }
# The board's kernel has no timers for ping to give up by, or to send a second one by.
answers() {
    busybox ping -c 1 "$address" >/dev/null 2>&1 &
    local ping=$!
    sleep 1
    if kill $ping 2>/dev/null; then return 1; fi
    wait $ping
}
has_worker() { local now; now=$(pids_of "$(domid $name)") && [ "$now" != "$worker" ]; }
# All that the guest says it says by its device.
console() { tr -d '\r' </tmp/alone.log 2>/dev/null; }
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=v$grants
    guest $name alone "memory = 192" "$(by_file $name <<DEVICES
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
)"
    sed -i 's/console=hvc0 quiet/console=hvc1 ignore_loglevel/' "/tmp/$name.cfg"
    rm -f /tmp/alone.log*
    create_by_file $name
    said $name 'guest: serves' >/dev/null
    address=$(said $name 'guest: address 10.8.0.5[0-9]/24' | sed 's/.* \([0-9.]*\)\/24.*/\1/')
    note "grants $grants: $(in_guest 'grep " / " /proc/mounts | tail -n1; ls /sys/bus/xen/devices; cat /sys/class/misc/hw_random/rng_current' | xargs), $address"
    [ -z "$(in_guest 'ls /sys/bus/xen/devices')" ] || fail "the guest has a PV device"
    has_said $name 'Run /init as init process' || fail "the guest's kernel does not speak by the console"
    ! grep -aq 'guest:' "$CONSOLES/guest-$name.log" || fail "the guest has spoken by Xen's console"
    note "$(busybox ping -c 1 -s 64000 "$address" | grep '64008 bytes from')"
    note "the guest: $(in_guest 'busybox ping -c 1 -s 64000 10.8.0.2' | grep '64008 bytes from')"
    streams "offloads on"
    in_guest 'ethtool -K eth0 tx off rx off tso off gso off gro off rx-gro-hw off 2>&1' | grep -v '^Actual\|^$\|^rx-\|^tx-\|^generic\|^tcp' || true
    streams "offloads off"
    in_guest 'ethtool -K eth0 tx on rx on tso on gso on gro on rx-gro-hw on' >/dev/null
    # Its interrupts as it asks for them; its filters.
    in_guest 'ethtool -C eth0 rx-usecs 200 rx-frames 32 tx-usecs 200 tx-frames 32 && ethtool -c eth0' | grep -q 'rx-usecs:.*200' || fail "ethtool -C"
    in_guest 'ip link set eth0 promisc on; ip link set eth0 promisc off; ip link add link eth0 name eth0.5 type vlan id 5 2>&1; ip link del eth0.5 2>/dev/null'
    # The cable.
    xen-virtioctl link $name virtio_file/1 down
    wait_for 5 "the cable to be out" link_is 0
    xen-virtioctl link $name virtio_file/1 up
    wait_for 5 "the cable to be in" link_is 1
    ! whole || streams "after the cable"
    note "the worker has $(resident "$(pids_of "$(domid $name)")") KiB resident"
    # Its driver, under load.
    (timeout 60 chroot /net-tools iperf3 -c "$address" -t 20 >/dev/null 2>&1 || true) &
    in_guest 'device=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net
for i in 1 2 3 4 5 6 7 8 9 10; do echo $device >unbind; echo $device >bind; ip addr add '"$address"'/24 dev eth0; ip link set eth0 up; sleep 0.3; done; echo "$i times"' |
        grep -q '10 times' || fail "the driver's coming and going"
    wait_for 20 "the guest to answer again" answers
    # Its worker, under load: a connection outlives it.
    timeout 100 guest-io receive tcp-listen:5001 >/tmp/received &
    receiver=$!
    sleep 0.5
    in_guest 'guest-io send tcp:10.8.0.2:5001 256 >/dev/null 2>&1 &' >/dev/null
    for ((i = 0; i < ${TIMES:-$(whole && echo 30 || echo 3)}; i++)); do
        worker=$(pids_of "$(domid $name)")
        kill -KILL "$worker"
        wait_for 10 "the next worker" has_worker
        sleep 0.4
    done
    wait $receiver || fail "the stream has not outlived the workers: $(cat /tmp/received)"
    note "the worker was killed $i times: $(cat /tmp/received | tail -n1)"
    xen-virtioctl list
    is_well $name
    # Under load.
    (timeout 20 chroot /net-tools iperf3 -c "$address" -t 20 >/dev/null 2>&1 || true) &
    sleep 1
    destroy $name
done
kill $dhcp
pkill iperf3 || true
ip link del br0
ip link del tap1
nothing_left "$fds"
