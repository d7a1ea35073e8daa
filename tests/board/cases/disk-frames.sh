# A guest that grants nothing lives on its disk, by its frames' numbers.
# Long: death has frames too.
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
worker=$(pids_of "$(domid g)")
[ "$(mapped "$worker" privcmd)" -gt 100 ] || fail "the worker maps $(mapped "$worker" privcmd) pages: what was tested?"
note "$(report requests) requests, $(report frames_mapped) frames mapped"
# Nothing stays mapped for a disk that is no more, but the page of the accesses.
close_disk g
[ "$(mapped "$worker" privcmd)" = 1 ] || fail "mapped without a disk: $(grep xen /proc/"$worker"/maps)"
destroy g
e2fsck -fn /tmp/disk.img || fail "the file system is damaged"
nothing_left "$fds"
