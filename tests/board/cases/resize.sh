# What a guest was told of its disk holds while the file grows and workers die; xen-virtioctl tells it of more.
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
guest g resize "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 0 xvdb) ]"
create g
said g 'guest: vda has 32768 sectors, vdb 32768' >/dev/null
kill_worker() {
    kill -KILL $(pids_of "$(domid g)")
    wait_for 20 "another worker" pids_of "$(domid g)" >/dev/null
}
truncate -s 20M /tmp/a.img
truncate -s 24M /tmp/b.img
kill_worker
verified() { count_said g 'guest: verified'; }
verifies_more() {
    local before
    before=$(verified)
    more() { [ "$(verified)" -gt $((before + 1)) ]; }
    wait_for 30 "the guest to verify more" more
    is_well g
}
verifies_more
has_said g '40960|49152' && fail "the guest sees a size that nobody told it of"
xen-virtioctl resize g xvda
said g 'guest: vda has 40960 sectors, vdb 32768' >/dev/null
xen-virtioctl resize "$(domid g)" virtio_disk/51728 || fail "resize by domid and entry"
said g 'guest: vda has 40960 sectors, vdb 49152' >/dev/null
kill_worker
verifies_more
truncate -s 18M /tmp/a.img
xen-virtioctl resize g xvda 2>/tmp/refused && fail "a disk was shrunk under its guest"
note "$(cat /tmp/refused)"
grep -q 'does not shrink' /tmp/refused || fail "the refusal does not say why"
truncate -s 20M /tmp/a.img
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
[ "$(count_said g '40960 sectors, vdb 49152')" = 1 ] || fail "the size changed more than once: $(console g | grep sectors)"
verifies_more
destroy g
[ -z "$(ls /run/xen-virtiod/disks)" ] || fail "left behind: $(ls /run/xen-virtiod/disks)"
