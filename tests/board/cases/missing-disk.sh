# A disk is gone when its guest's worker dies, then another one is in its place: the guest waits for its own, and has it back unharmed.
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
fds=$(daemon_fds)
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 1 xvdb) ]"
sed -i 's/GUEST=verify/& SECS=15/' /tmp/g.cfg
create g
verifies_on g
mv /tmp/a.img /tmp/away.img
kill -KILL $(pids_of "$(domid g)")
wait_for 5 "the log to name the missing disk" grep -q 'disk /tmp/a.img: cannot be opened' $DAEMON_LOG
verifies_on g
xen-virtioctl list | grep -q ' failed ' || fail "xen-virtioctl list does not show that it failed"
make_disk /tmp/a.img 16
kill -KILL $(pids_of "$(domid g)")
wait_for 5 "the other disk to be refused" grep -q 'another file or block device' $DAEMON_LOG
grep -a 'ERROR' $DAEMON_LOG | while read -r line; do note "$line"; done
mv /tmp/away.img /tmp/a.img
all_served() { ! xen-virtioctl list | grep -q ' failed '; }
wait_for 20 "the disk to be served again" all_served
said g 'guest: done' >/dev/null
is_well g
[ "$(count_said g 'verified:')" = 2 ] || fail "not both disks were verified"
note "$(said g 'verified:')"
destroy g
nothing_left "$fds"
