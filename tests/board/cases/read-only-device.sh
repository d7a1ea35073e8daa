# A block device that takes no writes is not given to a guest as if it did.
make_disk /tmp/disk.img 16
expected=$(md5sum </tmp/disk.img | cut -d' ' -f1)
losetup -r /dev/loop0 /tmp/disk.img
start_daemon
guest g read-only "disk = [ $(disk /dev/loop0) ]"
xen-virtioctl check /tmp/g.cfg 2>&1 | grep -q 'is a read-only device' || fail "check does not say so: $(xen-virtioctl check /tmp/g.cfg 2>&1)"
if whole; then
    xl create -q /tmp/g.cfg >/dev/null 2>&1 && fail "a guest was created that is to write a read-only device"
    grep -q 'disk /dev/loop0: is a read-only device' $DAEMON_LOG || fail "the log does not say so"
    note "$(grep -m1 'read-only device' $DAEMON_LOG)"
    wait_for 20 "guest g to be gone" is_gone g
fi
sed -i 's/access=rw/access=ro/' /tmp/g.cfg
create g
said g 'guest: done' >/dev/null
[ "$(said g 'guest: checksum')" = "guest: checksum $expected" ] || fail "the guest read another disk than dom0 wrote"
said g 'guest: a write fails' >/dev/null
is_well g
destroy g
