# vhost-device-vsock, unmodified: streams between a guest and Unix sockets of dom0, both ways; it dies, and the guest is told.
# Long: vhost-vsock has streams, and vhost-device unmodified back-ends.
mount_back_ends
start_daemon
fds=$(daemon_fds)
# It removes its socket's name as soon as somebody has connected.
start_vsock() {
    rm -f /run/vsock.*
    back_end vsock vhost-device-vsock --guest-cid 3 --socket /run/vsock.sock --uds-path /run/vsock.uds
}
receive() { timeout 100 guest-io receive unix-listen:/run/vsock.uds_5000 >/tmp/received & receiver=$!; }
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=v$grants
    start_vsock
    wait_for 10 "vhost-device-vsock" is_socket /run/vsock.sock
    guest $name vsock "$(by_file $name <<<"[[device]]
type = 'vsock'
socket = '/run/vsock.sock'
grant-usage = $grants")"
    # As much by grants as shows that no credit is lost in the long run.
    [ $grants = true ] && mib=64 || mib=8
    sed -i "s/GUEST=vsock/& MIB=$mib/" /tmp/$name.cfg
    receive
    create_by_file $name
    note "grants $grants: $(said $name "stream: sent" 60)"
    wait $receiver || fail "what the guest has sent has not arrived: $(cat /tmp/received)"
    grep -q "received $mib MiB as sent" /tmp/received || fail "dom0: $(cat /tmp/received)"
    said $name 'stream: listens' >/dev/null
    # For the stream after this one.
    rm /run/vsock.uds_5000
    timeout 100 guest-io receive unix-listen:/run/vsock.uds_5000 >/dev/null 2>&1 &
    timeout 100 guest-io send unix-connect:/run/vsock.uds:6000 $mib
    note "$(said $name "stream: received $mib MiB as sent" 60)"
    sees_only_ours $BACK_END
    xen-virtioctl list
    sleep 1
    kill -KILL $BACK_END
    note "$(said $name 'guest: a stream has ended' 10)"
    start_vsock
    receive
    note "$(said $name 'guest: and another one has begun' 30)"
    wait $receiver
    is_well $name
    destroy $name
    kill $BACK_END || true
done
nothing_left "$fds"
