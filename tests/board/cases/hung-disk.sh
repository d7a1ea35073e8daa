# A disk hangs while its guest resets it, its worker dies, libxl closes it, and a guest is destroyed: what else the guest has goes on.
hang=5000
# hanging NUMBER: /dev/dm-NUMBER, whose writes take as long as that.
hanging() {
    make_disk "/tmp/hung$1.img" 8
    losetup "/dev/loop$1" "/tmp/hung$1.img"
    dmsetup --noudevsync create "hung$1" --table "0 $((8 * 2048)) delay /dev/loop$1 0 0 /dev/loop$1 0 $hang"
}
on_disk() { tail -c +$((8 * 512 + 1)) "/tmp/hung0.img" | head -c 5 | tr -d ' '; }
hanging 0
hanging 1
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
fds=$(daemon_fds)
guest g hung "disk = [ $(disk /dev/dm-0), $(disk /tmp/a.img 1 xvdb) ]" "vcpus = 2"
create g
note "$(said g 'hung: reset took')"
# What the next driver has begun waits, and list says for what.
xen-virtioctl list | grep 'requests wait for 1 that the disk has not ended' || fail "list does not say what is waited for"
note "$(said g 'hung: new ended' 30)"
sleep 1
[ "$(on_disk)" = new ] || fail "the write of the driver before undid the next one's"
note "reset: the other disk's longest pause $(longest_pause g) ms"

said g 'hung: third is under way' >/dev/null
sleep 1
kill -KILL "$(pids_of "$(domid g)")"
waits() { xen-virtioctl list | grep -q 'transfers of an earlier worker are under way'; }
wait_for 4 "list to say that an earlier worker's transfers are waited for" waits
verifies_on g 4
has_said g 'hung: third ended' && fail "the write did not hang"
note "worker killed: the other disk's longest pause $(longest_pause g) ms; $(said g 'hung: third ended' 30)"
# QEMU's lock against other writers, which the dead worker's transfers had until then (byte 201, for reading).
grep -q "OFDLCK .* READ .*:$(stat -c %i /dev/dm-0) 201 201" /proc/locks || fail "the disk is not locked against QEMU any more"

state=backend/virtio_disk/$(domid g)/51712/state
said g 'hung: last is under way' >/dev/null
xenstore-write "$state" 5
sleep 1
is_closed "$state" && fail "the disk was closed while it hung"
verifies_on g 4
wait_for 10 "the disk to be closed" is_closed "$state"
[ "$(on_disk)" = last ] || fail "the disk was closed before its last write had ended"
note "closed: the other disk's longest pause $(longest_pause g) ms"

guest h hung "disk = [ $(disk /dev/dm-1), $(disk /tmp/b.img 1 xvdb) ]" "vcpus = 2"
create h
said h 'hung: old is under way' >/dev/null
# libxl itself waits until the disk is closed, ten seconds at most.
destroy h &
verifies_on g 4
wait $! || fail "the guest with the hung disk could not be destroyed"
verifies_on g
note "another guest destroyed: longest pause $(longest_pause g) ms"
destroy g
nothing_left "$fds"
