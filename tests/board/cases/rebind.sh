# A guest unbinds and rebinds the driver ten times under I/O, by grants and by frames.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 32
for grants in 1 0; do
    [ $grants = 1 ] || whole || continue
    guest g$grants rebind "disk = [ $(disk /tmp/disk.img $grants) ]"
    create g$grants
    said g$grants 'rebound 10' 90 >/dev/null
    said g$grants 'verified:' >/dev/null
    said g$grants 'guest: done' >/dev/null
    has_said g$grants FAIL && fail "$(said g$grants FAIL)"
    grep -q 'must reset' $DAEMON_LOG && fail "a device failed"
    note "grant_usage=$grants: $(said g$grants 'verified:')"
    destroy g$grants
done
nothing_left "$fds"
