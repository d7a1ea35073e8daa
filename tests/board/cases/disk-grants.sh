# A guest that grants its pages lives on its disk; only ring pages are mapped, and no frame by number.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 64
expected=$(md5sum </tmp/disk.img | cut -d' ' -f1)
guest g disk "disk = [ $(disk /tmp/disk.img) ]"
create g
said g 'guest: disk' >/dev/null
[ "$(said g 'guest: disk')" = "guest: disk $((64 * 2048)) sectors" ] || fail "the guest sees $(said g 'guest: disk')"
worker=$(pids_of "$(domid g)")
most=0
until has_said g 'guest: verified|guest: FAIL'; do
    # A snapshot each time: what is mapped while requests are on their way.
    rings=$(report grants_mapped) mapped=$(mapped "$worker" gntdev)
    [ "$mapped" = "$rings" ] || fail "the worker maps $mapped granted pages, and its rings have $rings"
    # 512 entries: two pages of descriptors, one of available ring, two of used ring.
    [ "$mapped" -le 5 ] || fail "$mapped pages are more than its ring needs"
    [ "$(mapped "$worker" privcmd)" = 1 ] || fail "privcmd maps more than the ioreq page: $(grep xen /proc/"$worker"/maps)"
    [ "$(report frames_mapped)" = 0 ] || fail "foreign frames are mapped"
    [ "$mapped" -gt "$most" ] && most=$mapped
    has_said g 'guest: done' && break
    sleep 0.3
done
said g 'guest: verified' >/dev/null
[ "$(said g 'guest: checksum')" = "guest: checksum $expected" ] || fail "the guest read another disk than dom0 wrote"
[ "$most" -gt 0 ] || fail "no ring was ever seen mapped"
[ "$(report requests)" -gt 100 ] || fail "$(report requests) requests"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
xen-virtioctl list | grep -q 'ACCESS_PLATFORM' || fail "xen-virtioctl does not show the features"
note "$(report requests) requests, $most granted pages mapped at most, all of rings"
said g 'guest: done' >/dev/null
destroy g
e2fsck -fn /tmp/disk.img || fail "the file system is damaged"
nothing_left "$fds"
