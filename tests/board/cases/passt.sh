# passt, unmodified and kept running by the service, brings a guest to dom0 over TCP and UDP, without a bridge and without root.
mount_back_ends
start_daemon
fds=$(daemon_fds)
ip() { chroot /back-ends ip "$@"; }
# passt gives the guest the address of an interface that has a default route.
ip link show v0 >/dev/null 2>&1 || ip link add v0 type veth peer name v1
ip link set lo up
ip link set v0 up
ip link set v1 up
ip addr replace 10.9.0.1/24 dev v0
ip route replace default via 10.9.0.2 dev v0
# With the libraries of its own root.
libraries=/back-ends/usr/lib/aarch64-linux-gnu
for grants in true false; do
    [ $grants = true ] || whole || continue
    guest $grants net "$(by_file $grants <<<"[[device]]
type = 'net'
socket = '/run/sockets/passt.sock'
exec = '$libraries/ld-linux-aarch64.so.1 --library-path $libraries /back-ends/usr/bin/passt --vhost-user --foreground --socket {socket}'
user = '1000'
mac = '00:16:3e:00:00:07'
grant-usage = $grants")"
    sed -i 's/GUEST=net/& MIB=8/' /tmp/$grants.cfg
    begin_streams 8
    create_by_file $grants
    note "grants $grants: $(said $grants 'stream: received 8 MiB as sent' 60)"
    end_streams $grants 8
    sees_only_ours "$(pgrep -U 1000 | tail -n 1)"
    xen-virtioctl list
    destroy $grants
done
ip link del v0
nothing_left "$fds"
