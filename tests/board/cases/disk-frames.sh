# A guest that grants nothing lives on its disk, by its frames' numbers.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 64
expected=$(md5sum </tmp/disk.img | cut -d' ' -f1)
guest g disk "disk = [ $(disk /tmp/disk.img 0) ]"
create g
said g 'guest: verified' 90 >/dev/null
[ "$(said g 'guest: checksum')" = "guest: checksum $expected" ] || fail "the guest read another disk than dom0 wrote"
said g 'guest: done' >/dev/null
[ "$(report frames_mapped)" -gt 0 ] || fail "no frame is mapped: what was tested?"
[ "$(report frames_mapped)" -le 16500 ] || fail "$(report frames_mapped) frames are mapped: the cache is not bounded"
[ "$(report grants_mapped)" = 0 ] || fail "grants are mapped"
note "$(report requests) requests, $(report frames_mapped) frames mapped"
destroy g
e2fsck -fn /tmp/disk.img || fail "the file system is damaged"
nothing_left "$fds"
