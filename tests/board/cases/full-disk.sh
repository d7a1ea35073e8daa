# dom0's disk fills up under a guest's sparse image: the guest waits, list says why, and it goes on when there is room.
# Long: tests/tests/shortage.rs shows it on the simulator.
mkdir -p /tmp/small
mount -t tmpfs -o size=10M tmpfs /tmp/small
truncate -s 16M /tmp/small/disk.img
make_disk /tmp/b.img 16
start_daemon
guest g verify "disk = [ $(disk /tmp/small/disk.img), $(disk /tmp/b.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=25'"
xen-virtioctl check /tmp/g.cfg 2>&1 | grep -q 'bytes allocated' || fail "check does not warn of a sparse image: $(xen-virtioctl check /tmp/g.cfg 2>&1)"
create g
waits() { xen-virtioctl list | grep -q 'waits for dom0 .*No space left'; }
wait_for 40 "list to say that there is no room" waits
note "$(xen-virtioctl list | grep 'waits for dom0')"
verifies_on g
mount -o remount,size=24M /tmp/small
goes_on() { ! waits; }
wait_for 10 "the guest to go on" goes_on
said g 'guest: done' 60 >/dev/null
is_well g
[ "$(count_said g 'verified:')" = 2 ] || fail "not both disks were verified"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy g
umount /tmp/small
