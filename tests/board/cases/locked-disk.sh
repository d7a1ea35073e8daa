# A disk that somebody has locked holds up no other of its guest, and is served as soon as it is let go.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 1 xvdb) ]"
sed -i 's/GUEST=verify/& SECS=2/' /tmp/g.cfg
cat >/tmp/lock.py <<'PYTHON'
import fcntl, time
disk = open("/tmp/b.img", "r+")
fcntl.lockf(disk, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
PYTHON
python3 /tmp/lock.py >/tmp/locked &
locker=$!
wait_for 10 "the disk to be locked" grep -q locked /tmp/locked
xl create -q /tmp/g.cfg &
creating=$!
wait_for 10 "the log to say that the disk is locked" grep -q 'virtio_disk/51728: somebody else has a lock' $DAEMON_LOG
grep -q 'virtio_disk/51712 is /tmp/a.img' $DAEMON_LOG || fail "the other disk is held up: $(cat $DAEMON_LOG)"
xen-virtioctl list | grep -q ' failed ' || fail "xen-virtioctl list does not show that it is locked"
kill $locker
wait $creating || fail "xl create failed"
said g 'guest: done' >/dev/null
is_well g
note "$(said g 'verified:')"
destroy g
nothing_left "$fds"
