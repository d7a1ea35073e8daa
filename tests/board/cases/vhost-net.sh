# The kernel's vhost-net, on memory of ours: a guest reaches dom0 over a tap by TCP and UDP; the worker and the service die.
# Long: vhost-vsock is served by the same code, and net takes the same way.
mount_back_ends
start_daemon
fds=$(daemon_fds)
ip() { chroot /back-ends ip "$@"; }
ip link set lo up
ip tuntap add dev tap7 mode tap
ip addr add 10.9.0.2/24 dev tap7
ip link set tap7 up
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=n$grants
    guest $name net "$(by_file $name <<<"[[device]]
type = 'net'
tap = 'tap7'
vhost = true
mac = '00:16:3e:00:00:07'
grant-usage = $grants")"
    sed -i 's/GUEST=net/& MIB=64/' /tmp/$name.cfg
    begin_streams 64
    create_by_file $name
    note "grants $grants: $(said $name 'stream: received 64 MiB as sent' 60)"
    # The connection that is under way goes on by the next worker, and by one of the next service's.
    worker=$(pids_of "$(domid $name)")
    kill -KILL "$worker"
    wait_for 10 "the next worker" has_worker
    kill -KILL $DAEMON && restart_daemon
    end_streams $name 64
    xen-virtioctl list
    is_well $name
    destroy $name
done
ip link del tap7
nothing_left "$fds"
