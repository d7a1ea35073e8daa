# A guest of virtio alone: a disk as its root, an address by DHCP over dom0's bridge, entropy, a console for its kernel's messages, a shell over sockets. Streams both ways with offloads and without; its driver comes and goes, its worker dies.
. ./alone.sh
alone_begin
link_is() { [ "$(in_guest 'cat /sys/class/net/eth0/carrier')" = "$1" ]; }
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=v$grants
    alone_guest $name $grants alone
    pings
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
    load &
    in_guest 'address=$(ip -4 -o addr show eth0 | sed "s#.*inet \([^ ]*\).*#\1#")
device=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net
for i in 1 2 3 4 5 6 7 8 9 10; do echo $device >unbind; echo $device >bind; ip addr add $address dev eth0; ip link set eth0 up; sleep 0.3; done; echo "$i times"' |
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
    load &
    sleep 1
    destroy $name
done
alone_end
