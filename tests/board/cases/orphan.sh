# A guest whose entries were removed while the service was stopped: no worker of the old program is left that nobody sees.
make_disk /tmp/disk.img 16
# Another build may have another number of descriptors open: it is this one that ends the case.
start_daemon
fds=$(daemon_fds)
kill -TERM $DAEMON
PATH=/payload/earlier:$PATH
restart_daemon
guest g idle "disk = [ $(disk /tmp/disk.img) ]"
create g
said g 'guest: done' >/dev/null
domid=$(domid g)
before=$(pids_of "$domid")
kill -TERM $DAEMON
wait $DAEMON || true
# It finds out at once that its supervisor is gone.
sleep 1
kill -0 "$before" || fail "the worker has died with its supervisor"
xenstore-rm "backend/virtio_disk/$domid"
PATH=/payload/bin:$PATH
restart_daemon
is_served_anew() { [ "$(readlink "/proc/$(pids_of "$domid")/exe")" = /payload/bin/xen-virtiod ]; }
wait_for 10 "the new program to take the guest over" is_served_anew
note "worker $before of the program before, now $(pids_of "$domid")"
xen-virtioctl list | grep -qi panicked && fail "a panic"
xl destroy g || true
wait_for 20 "guest g to be gone" is_gone g
nothing_left "$fds"
