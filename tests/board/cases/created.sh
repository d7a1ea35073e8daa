# xen-virtioctl create gives a guest what xl has no words for, and no guest where that is wrong.
needs_libxl 4.19
make_disk /tmp/disk.img 16
make_disk /tmp/other.img 4
mount_back_ends
start_daemon
fds=$(daemon_fds)
back_end rng vhost-device-rng --socket-path /run/rng.sock --rng-source /dev/urandom
guest g created "xen_virtio = [ 'blk, path=/tmp/disk.img'," "    'rng, socket=/run/rng.sock0', 'empty' ]"
created=$(xen-virtioctl create /tmp/g.cfg) || fail "create"
grep -q 'virtio/0: /tmp/disk.img, read-write' <<<"$created" || fail "it says: $created"
grep -q 'virtio/1: rng by /run/rng.sock0' <<<"$created" || fail "it says: $created"
note "$(said g 'verified:' 60)"
# A slot that xl knows as a device of type 0.
grep -q 'virtio/2: an empty slot' <<<"$created" || fail "it says: $created"
xen-virtioctl attach g 'blk, path=/tmp/other.img' | grep -q 'virtio_attached/0 at 0x2000400' || fail "attach"
said g 'uses what was attached' >/dev/null
said g 'guest: random bytes: 16' >/dev/null
xen-virtioctl wait g >/dev/null || fail "wait"
# A reboot finds the same devices.
said g 'guest: reboots' >/dev/null
is_second() { [ "$(count_said g 'guest: created')" -ge 2 ]; }
wait_for 60 "the guest to come again" is_second
verified_again() { [ "$(count_said g 'verified:')" -ge 3 ]; }
wait_for 60 "the guest to find its devices again" verified_again
xen-virtioctl list | grep -q 'virtio/2 *empty *waiting' || fail "the slot is not empty after a reboot"
is_well g
destroy g
kill $BACK_END

# refuses PATTERN SED: what create says of the file after SED, and that there is no guest then.
refuses() {
    sed "$2" /tmp/g.cfg >/tmp/wrong.cfg
    local said
    said=$(xen-virtioctl create --timeout 2 /tmp/wrong.cfg 2>&1) && fail "created after $2"
    grep -q "$1" <<<"$said" || fail "after $2 it says: $said"
    wait_for 10 "no guest to be left after $2" is_gone g
    note "$(head -n1 <<<"$said")"
}
refuses 'line 9: .*unknown field `sokcet`' 's/socket=/sokcet=/'
refuses 'line 8: .*is none of blk, console, empty, fs' "s/'blk, /'block, /"
refuses 'no back-end is at /run/away.sock' 's#/run/rng.sock0#/run/away.sock#'
refuses '/tmp/away.img' 's#/tmp/disk.img#/tmp/away.img#'
nothing_left "$fds"
