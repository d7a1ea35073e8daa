# A disk that somebody has locked holds up no other of its guest, and is served as soon as it is let go.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 1 xvdb) ]"
sed -i 's/GUEST=verify/& SECS=2/' /tmp/g.cfg
cat >/tmp/lock.py <<'PYTHON'
import fcntl, time
disk = open("/tmp/a.img", "r+")
fcntl.lockf(disk, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
PYTHON
python3 /tmp/lock.py >/tmp/locked &
locker=$!
wait_for 10 "the disk to be locked" grep -q locked /tmp/locked
xl create -q /tmp/g.cfg &
creating=$!
wait_for 10 "the log to say that the disk is locked" grep -q 'virtio_disk/51712: waits: somebody else has a lock' $DAEMON_LOG
other_served() { xen-virtioctl list | grep ' virtio_disk/51728 ' | grep -q 'no driver'; }
wait_for 2 "the other disk to be served" other_served
xen-virtioctl list | grep ' virtio_disk/51712 ' | grep -q ' failed ' || fail "xen-virtioctl list does not show that it is locked"
kill -KILL $(pids_of '[0-9]+')
wait_for 2 "the other disk to be served by another worker" other_served
kill $locker
wait $creating || fail "xl create failed"
said g 'guest: done' >/dev/null
is_well g
note "$(said g 'verified:')"
destroy g
nothing_left "$fds"
