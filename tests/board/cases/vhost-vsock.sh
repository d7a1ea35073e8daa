# The kernel's vhost-vsock, on memory of ours: streams between a guest and dom0's AF_VSOCK, both ways; the worker dies.
start_daemon
fds=$(daemon_fds)
receive() { timeout 100 guest-io receive vsock-listen:5000 >/tmp/received & receiver=$!; }
# vsock_guest NAME GRANTS
vsock_guest() {
    guest "$1" vsock "$(by_file "$1" <<<"[[device]]
type = 'vsock'
cid = 42
grant-usage = $2")"
    sed -i "s/GUEST=vsock/& MIB=$mib/" "/tmp/$1.cfg"
}
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=k$grants
    # As much by grants as shows that no credit is lost in the long run.
    [ $grants = true ] && mib=64 || mib=8
    vsock_guest $name $grants
    receive
    create_by_file $name
    note "grants $grants: $(said $name "stream: sent" 60)"
    wait $receiver || fail "what the guest has sent has not arrived: $(cat /tmp/received)"
    grep -q "received $mib MiB as sent" /tmp/received || fail "dom0: $(cat /tmp/received)"
    said $name 'stream: listens' >/dev/null
    # For the stream after this one.
    timeout 100 guest-io receive vsock-listen:5000 >/dev/null 2>&1 &
    timeout 100 guest-io send vsock:42:6000 $mib
    note "$(said $name "stream: received $mib MiB as sent" 60)"
    xen-virtioctl list
    worker=$(pids_of "$(domid $name)")
    # Rings of three queues, and nothing else of the guest.
    [ $grants = false ] || [ "$(mapped "$worker" gntdev)" -le 30 ] || fail "the worker maps $(mapped "$worker" gntdev) pages"
    if [ $grants = true ]; then
        vsock_guest other true
        xl create -q -p /tmp/other.cfg
        logged() { grep -q "guest other.*somebody else has cid = 42" $DAEMON_LOG; }
        wait_for 10 "a word on the number that another guest has" logged
        destroy other
    fi
    sleep 1
    kill -KILL "$worker"
    note "$(said $name 'guest: a stream has ended' 10)"
    receive
    note "$(said $name 'guest: and another one has begun' 30)"
    wait $receiver
    is_well $name
    destroy $name
done
nothing_left "$fds"
