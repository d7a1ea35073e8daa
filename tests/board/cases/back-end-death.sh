# A worker, its back-end and the service are killed at any time while a guest verifies a disk that qemu-storage-daemon serves.
# Long: storage-daemon kills both too.
kills=${TIMES:-8}
make_disk /tmp/raw.img 32
mount_back_ends
start_daemon
fds=$(daemon_fds)
socket=/run/storage.sock
storage_daemon() {
    rm -f $socket
    back_end storage qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=/tmp/raw.img \
        --export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=$socket,writable=on
}
storage_daemon
wait_for 20 "qemu-storage-daemon" is_socket $socket
guest g verify-one "$(by_file g <<<"[[device]]
type = 'blk'
socket = '$socket'")"
sed -i "s/GUEST=verify-one/& SECS=100000/" /tmp/g.cfg
create_by_file g
verifies_on g
domid=$(domid g)
has_worker() { pids_of "$domid" >/dev/null; }
a_while() { sleep "$((RANDOM % 2)).$((RANDOM % 10))"; }
for ((kill = 1; kill <= kills; kill++)); do
    wait_for 30 "a worker" has_worker
    kill -KILL $(pids_of "$domid") 2>/dev/null || true
    a_while
done
verifies_on g
note "the worker killed $kills times: longest pause $(longest_pause g) ms"
for ((kill = 1; kill <= (kills + 3) / 4; kill++)); do
    kill -KILL $BACK_END
    wait $BACK_END 2>/dev/null || true
    # It is away for longer than anybody would wait with a timeout of a second or two.
    [ $kill != 1 ] || sleep 3
    storage_daemon
    a_while
    wait_for 30 "a worker" has_worker
    kill -KILL $BACK_END $(pids_of "$domid")
    wait $BACK_END 2>/dev/null || true
    a_while
    storage_daemon
    a_while
done
verifies_on g
note "qemu-storage-daemon killed, and both: $(((kills + 3) / 4)) times each; longest pause $(longest_pause g) ms"
kill -KILL $DAEMON && restart_daemon
verifies_on g
kill -KILL $DAEMON $(pids_of "$domid") && restart_daemon
verifies_on g
note "the service killed, and both: longest pause $(longest_pause g) ms"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy g
kill $BACK_END
nothing_left "$(daemon_fds)"
