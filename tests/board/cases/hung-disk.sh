# A disk hangs while its guest unbinds it and resets it, its worker dies, libxl closes it, and a guest is destroyed: all else goes on.
dm() { dmsetup --noudevsync "$@"; }
# A suspended table takes transfers and ends none, for as long as it is.
hang() { dm suspend --noflush --nolockfs "hung$1"; }
end_hang() { dm resume "hung$1"; }
hanging() {
    make_disk "/tmp/hung$1.img" 8
    losetup "/dev/loop$1" "/tmp/hung$1.img"
    dm create "hung$1" --table "0 $((8 * 2048)) linear /dev/loop$1 0"
}
# on_disk SECTOR: what was written there.
on_disk() { tail -c +$(($1 * 512 + 1)) "/tmp/hung0.img" | head -c 5 | tr -d ' '; }
# The other disk's longest pause from here on, and then. Up to 100 ms are the aim. The emulation has pauses of its own, of up to a
# second on a slow host; one that waited for the disk that hangs would wait for the eight seconds and more that it does.
LIMIT=3000
begin_pauses() { pauses_from=$(count_said g 'longest pause'); }
pauses() { verifies_on g 4 && verifies_on g 4 && longest_pause g "$pauses_from"; }
# paused WHAT USUAL
paused() {
    local longest
    longest=$(pauses)
    note "$1: the other disk's longest pause $longest ms, usual $2"
    [ "$longest" -le $LIMIT ] || fail "$1: the other disk paused for $longest ms"
    begin_pauses
}
hanging 0
hanging 1
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
fds=$(daemon_fds)
guest g hung "disk = [ $(disk /dev/dm-0), $(disk /tmp/a.img 1 xvdb) ]" "vcpus = 2"
create g
said g 'longest pause' >/dev/null
begin_pauses
usual=$(pauses)
begin_pauses
kill -KILL "$(pids_of "$(domid g)")"
usual_death=$(pauses)
begin_pauses
said g 'hang it for linux' >/dev/null
hang 0
said g 'a write of Linux is under way' >/dev/null
paused "unbound by Linux" "$usual"
has_said g 'guest: unbound' && fail "the write did not hang"
end_hang 0
said g 'guest: unbound' >/dev/null
[ "$(on_disk 32)" = linux ] || fail "Linux's write is not there"

said g 'hang it for old' >/dev/null
hang 0
note "$(said g 'hung: reset took')"
paused "reset" "$usual"
# What the next driver has begun waits, and list says for what.
xen-virtioctl list | grep 'requests wait for 1 that the disk has not ended' || fail "list does not say what is waited for"
has_said g 'hung: new ended' && fail "the next driver's write did not wait"
end_hang 0
note "$(said g 'hung: new ended' 30)"
sleep 1
[ "$(on_disk 8)" = new ] || fail "the write of the driver before undid the next one's"

said g 'hang it for third' >/dev/null
hang 0
said g 'hung: third is under way' >/dev/null
kill -KILL "$(pids_of "$(domid g)")"
waits() { xen-virtioctl list | grep -q 'transfers of an earlier worker are under way'; }
paused "worker killed" "$usual_death"
wait_for 4 "list to say that an earlier worker's transfers are waited for" waits
has_said g 'hung: third ended' && fail "the write did not hang"
end_hang 0
note "$(said g 'hung: third ended' 30)"
# QEMU's lock against other writers, which the dead worker's transfers had until then (byte 201, for reading).
grep -q "OFDLCK .* READ .*:$(stat -c %i /dev/dm-0) 201 201" /proc/locks || fail "the disk is not locked against QEMU any more"

if whole; then
    state=backend/virtio_disk/$(domid g)/51712/state
    said g 'hang it for last' >/dev/null
    hang 0
    said g 'hung: last is under way' >/dev/null
    xenstore-write "$state" 5
    paused "closed" "$usual"
    is_closed "$state" && fail "the disk was closed while it hung"
    end_hang 0
    wait_for 10 "the disk to be closed" is_closed "$state"
    [ "$(on_disk 24)" = last ] || fail "the disk was closed before its last write had ended"

    # libxl waits ten seconds for a disk to be closed, and does without then.
    guest h hung "disk = [ $(disk /dev/dm-1), $(disk /tmp/b.img 1 xvdb) ]" "vcpus = 2"
    create h
    said h 'hang it for linux' >/dev/null
    hang 1
    said h 'a write of Linux is under way' >/dev/null
    destroy h
    paused "another guest destroyed" "$usual"
    holds_lock() { grep -q "OFDLCK .*:$(stat -c %i /dev/dm-1) " /proc/locks; }
    holds_lock || fail "the disk is free while a write of the dead guest may still reach it"
    end_hang 1
    let_go() { ! holds_lock; }
    wait_for 10 "the dead guest's last write to let go of its disk" let_go
fi
destroy g
nothing_left "$fds"
