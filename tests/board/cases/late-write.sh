# A write that a killed worker has left with a slow disk ends before the next worker's first, and before libxl is told of the end.
# Long: hung-disk has writes that end late too.
make_disk /tmp/disk.img 8
losetup /dev/loop0 /tmp/disk.img
dmsetup --noudevsync create slow --table "0 $((8 * 2048)) delay /dev/loop0 0 0 /dev/loop0 0 3000"
start_daemon
guest g late-write "disk = [ $(disk /dev/dm-0) ]"
create g
said g 'guest: writes' >/dev/null
sleep 1
has_said g 'wrote old' && fail "the disk is not slow: what was tested?"
kill -KILL "$(pids_of "$(domid g)")"
waits() { xen-virtioctl list | grep 'transfers of an earlier worker are under way'; }
wait_for 2 "the next worker to wait" waits
has_said g 'wrote old' && fail "it waited for nothing"
said g 'guest: wrote old' 20 >/dev/null
said g 'guest: wrote new' 20 >/dev/null
on_disk() { tail -c +$((8 * 512 + 1)) /tmp/disk.img | head -c 4 | tr -d ' '; }
sleep 4
[ "$(on_disk)" = new ] || fail "the old write undid the new one"
is_well g
said g 'guest: writes again' >/dev/null
sleep 1
state=backend/virtio_disk/$(domid g)/51712/state worker=$(pids_of "$(domid g)")
# The next worker never has the disk: the entry is to be closed when the service sees that this one is dead.
kill -STOP $DAEMON
kill -KILL "$worker"
xenstore-write "$state" 5
kill -CONT $DAEMON
wait_for 20 "the disk to be closed" is_closed "$state"
[ "$(on_disk)" = last ] || fail "the disk was closed before the last write had ended"
destroy g
