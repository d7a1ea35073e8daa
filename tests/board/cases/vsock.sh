# Sockets of our own: streams between a guest and programs of dom0's at Unix sockets, both ways; the driver comes and goes, the worker dies, the service is killed, the guest is destroyed, all under load.
mount_net_tools
start_daemon
fds=$(daemon_fds)
mib=$(whole && echo 64 || echo 16)
sent() { report sent_bytes; }
goes_on() { [ "$(sent)" -gt 1000000 ]; }
is_answered() { [ "$(printf 'CONNECT 9\n' | chroot /net-tools /usr/bin/socat -t 5 - UNIX-CONNECT:/tmp/$name.vsock 2>&1)" = "" ]; }
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=s$grants
    guest $name sockets "$(by_file $name <<<"[[device]]
type = 'vsock'
cid = 42
listen = '/tmp/$name.vsock'
grant-usage = $grants")"
    sed -i "s/GUEST=sockets/& MIB=$mib/" "/tmp/$name.cfg"
    timeout 100 guest-io receive unix-listen:/tmp/$name.vsock_5000 >/tmp/received &
    receiver=$!
    chroot /net-tools /usr/bin/socat -u UNIX-LISTEN:/tmp/$name.vsock_5001,fork /dev/null &
    create_by_file $name
    note "grants $grants: $(said $name 'stream: sent' 60)"
    wait $receiver || fail "what the guest has sent has not arrived: $(cat /tmp/received)"
    grep -q "received $mib MiB as sent" /tmp/received || fail "dom0: $(cat /tmp/received)"
    said $name 'stream: listens' >/dev/null
    timeout 100 guest-io send unix-connect:/tmp/$name.vsock:6000 $mib
    note "$(said $name "stream: received $mib MiB as sent" 60)"
    is_answered || fail "a port of the guest's at which nobody listens is not refused"
    note "$(said $name 'guest: bound 10 times' 60)"
    note "the worker has $(resident "$(pids_of "$(domid $name)")") KiB resident"
    for ((i = 0; i < ${TIMES:-$(whole && echo 30 || echo 3)}; i++)); do
        wait_for 20 "a stream of the guest's" goes_on
        worker=$(pids_of "$(domid $name)")
        kill -KILL "$worker"
        wait_for 10 "the next worker" has_worker
    done
    wait_for 20 "the stream after the last death" goes_on
    note "the worker was killed $i times, the next stream began each time"
    worker=$(pids_of "$(domid $name)")
    kill -KILL "$DAEMON"
    restart_daemon
    wait_for 10 "the next worker" has_worker
    wait_for 20 "the stream after the service's death" goes_on
    is_answered || fail "the next service's socket is not answered"
    xen-virtioctl list
    is_well $name
    destroy $name
    [ ! -e /tmp/$name.vsock ] || fail "the socket is there still"
    pkill socat || true
done
nothing_left "$fds"
