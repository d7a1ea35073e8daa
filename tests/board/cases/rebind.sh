# A guest unbinds and rebinds the driver ten times under I/O.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 32
guest g rebind "disk = [ $(disk /tmp/disk.img) ]"
create g
said g 'rebound 10' 90 >/dev/null
said g 'verified:' >/dev/null
said g 'guest: done' >/dev/null
has_said g FAIL && fail "$(said g FAIL)"
grep -q 'must reset' $DAEMON_LOG && fail "a device failed"
note "$(said g 'verified:')"
destroy g
nothing_left "$fds"
