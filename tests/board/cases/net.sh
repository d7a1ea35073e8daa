# virtio-net on an interface that is made and given to a bridge by xl's vif-bridge, on a tap and a macvtap, with one queue and two, by grants and by frames: a guest reaches dom0 by TCP and UDP; the worker and the service die.
mount_net_tools
start_daemon
fds=$(daemon_fds)
ip link set lo up
# reaches NAME VCPUS SETTINGS: creates a guest with such a device, which streams 64 MiB both ways while its worker and the service die.
reaches() {
    name=$1
    guest "$name" net "vcpus = $2" "$(by_file "$name" <<<"[[device]]
type = 'net'
mac = '00:16:3e:00:00:07'
$3")"
    sed -i 's/GUEST=net/& MIB=64/' "/tmp/$name.cfg"
    begin_streams 64
    create_by_file "$name"
    note "$name: $(said "$name" 'stream: received 64 MiB as sent' 60)"
    [ "$name" != made ] || is_in_bridge || fail "the interface is in no bridge"
    worker=$(pids_of "$(domid "$name")")
    kill -KILL "$worker"
    wait_for 10 "the next worker" has_worker
    kill -KILL $DAEMON && restart_daemon
    end_streams "$name" 64
    xen-virtioctl list
    is_well "$name"
    destroy "$name"
}
# vif-bridge wants ip.
mkdir -p /usr/local/bin
printf '#!/bin/sh\nexec chroot /net-tools /usr/sbin/ip "$@"\n' >/usr/local/bin/ip
chmod +x /usr/local/bin/ip
bridge br7 10.9.0.2/24
is_in_bridge() { [ -e "/sys/class/net/br7/brif/viof$(domid made).0" ]; }
no_interface() { ! ls /sys/class/net | grep -q '^vio'; }
reaches made 1 "bridge = 'br7'"
wait_for 10 "the interface to be removed: $(ls /sys/class/net)" no_interface
ip link del br7
whole || { nothing_left "$fds"; exit 0; }
ip tuntap add dev tap7 mode tap
ip addr add 10.9.0.2/24 dev tap7
ip link set tap7 up
reaches grants 1 "tap = 'tap7'"
ip link del tap7
ip tuntap add dev tap7 mode tap multi_queue
ip addr add 10.9.0.2/24 dev tap7
ip link set tap7 up
reaches queues 2 "tap = 'tap7'
grant-usage = false
queues = 2"
ip link del tap7
ip link add v0 type veth peer name v1
ip addr add 10.9.0.2/24 dev v1
ip link set v0 up
ip link set v1 up
ip link add link v0 name mv7 address 00:16:3e:00:00:07 type macvtap mode bridge
ip link set mv7 up
reaches macvtap 1 "tap = 'mv7'"
ip link del v0
nothing_left "$fds"
