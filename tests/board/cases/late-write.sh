# A write that a killed worker has left with a slow disk ends before the next worker's first: that one waits for it.
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
# The lock that the next worker waits for: a line that begins with an arrow.
waits() { grep -q -- '-> OFDLCK' /proc/locks; }
wait_for 2 "the next worker to wait" waits
has_said g 'wrote old' && fail "it waited for nothing"
note "$(grep -- '-> OFDLCK' /proc/locks)"
said g 'guest: wrote old' 20 >/dev/null
said g 'guest: wrote new' 20 >/dev/null
sleep 4
[ "$(tail -c +$((8 * 512 + 1)) /tmp/disk.img | head -c 3)" = new ] || fail "the old write undid the new one"
is_well g
destroy g
