# doctor finds no fault where there is none, and names each of the board's broken set-ups with what mends it.
found=0
# finds SEVERITY SUBJECT WHAT REMEDY [ABOUT]: by regular expressions. Alone, if that is a fault of the host.
finds() {
    local status=0
    "${LOOK[@]}" xen-virtioctl doctor ${5:-} >/tmp/doctor || status=$?
    grep -A 2 -E "^$1: $2: .*$3" /tmp/doctor | grep -qE "^  remedy: .*$4" || fail "doctor does not find the $1 of $2 ($3; $4): $(cat /tmp/doctor)"
    [ $status = "$([ "$1" = fault ] && echo 4 || status_of_warnings)" ] || fail "doctor ends with $status for the $1 of $2"
    found=$((found + 1))
}
status_of_warnings() { grep -q '^fault: ' /tmp/doctor && echo 4 || echo 3; }
# What doctor is run by.
LOOK=()
has_no_fault() {
    local status=0
    xen-virtioctl doctor ${1:-} >/tmp/doctor || status=$?
    ! grep -q '^fault: ' /tmp/doctor || fail "doctor finds a fault where there is none: $(cat /tmp/doctor)"
    [ $status = 0 ] || [ $status = 3 ] || fail "doctor ends with $status"
}
# without NODE WHAT...: the while WHAT is done, there is no such node of the kernel's.
without() {
    local node=$1
    shift
    mv "$node" /tmp/hidden-node
    "$@"
    mv /tmp/hidden-node "$node"
}

# The host.
finds fault service 'nothing listens' 'start xen-virtiod'
xenstore-write backend/virtio_disk/4711/51712/state 6
finds warning leftovers 'backend/virtio_disk/4711 ' 'xenstore-rm /local/domain/0/backend/virtio_disk/4711'
xenstore-rm backend/virtio_disk/4711
mkdir -p /run/xen-virtiod/state /etc/xen-virtiod/guests
: >/run/xen-virtiod/state/4711-x
finds warning leftovers /run/xen-virtiod/state/4711-x 'start xen-virtiod'
echo '[limits]' >/etc/xen-virtiod/config.toml
chmod 666 /etc/xen-virtiod/config.toml
finds fault permissions /etc/xen-virtiod/config.toml 'chmod go-w'
chmod 644 /etc/xen-virtiod/config.toml
echo 'cpu_percent = 10' >>/etc/xen-virtiod/config.toml
finds fault configuration cpu_percent 'xen-virtioctl check'
rm /etc/xen-virtiod/config.toml
printf '[[device]]\ntype = "rgn"\n' >/etc/xen-virtiod/guests/x.toml
finds fault configuration 'x.toml.*rgn' 'xen-virtioctl check'
rm /etc/xen-virtiod/guests/x.toml
start_daemon
fds=$(daemon_fds)
has_no_fault
note "healthy: $(tail -n 1 /tmp/doctor)"
[ "$XEN_VERSION" != 4.17 ] || finds warning xl 'no virtio = ' '4\.19'
without /dev/xen/gntdev finds fault gntdev 'not there' 'CONFIG_XEN_GNTDEV'
without /dev/xen/privcmd finds fault privcmd 'not there' 'CONFIG_XEN_PRIVCMD'
without /dev/xen/evtchn finds fault evtchn 'not there' 'CONFIG_XEN_DEV_EVTCHN'
echo 2 >/proc/sys/kernel/io_uring_disabled
finds warning io_uring 'io_uring_disabled is 2' 'io_uring_disabled=0'
echo 0 >/proc/sys/kernel/io_uring_disabled
LOOK=(unshare -m bash -c 'mount --make-rprivate / && mount -t tmpfs none /run/xenstored && mount --bind /dev/null /dev/xen/xenbus && "$@"' -)
finds fault xenstored 'xenstored' 'start xenstored'
LOOK=(unshare -m bash -c 'mount --make-rprivate / && mount -t tmpfs -o size=64k none /run/xen-virtiod && "$@"' -)
finds fault state 'bytes left' 'remount'
setpriv --reuid 1000 --regid 1000 --clear-groups xen-virtioctl doctor >/tmp/doctor 2>&1 && fail "doctor ends well for somebody who is not root"
grep -q 'only root.*sudo' /tmp/doctor || fail "doctor does not say who may look: $(cat /tmp/doctor)"
LOOK=(env PATH=/payload/bin:/usr/bin)
finds warning xl 'no xl in PATH' 'tools'
LOOK=()

# The file of a guest.
make_disk /tmp/a.img 16
mkdir -p /tmp/small
mount -t tmpfs -o size=6M tmpfs /tmp/small
truncate -s 16M /tmp/small/full.img
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/small/full.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
has_no_fault /tmp/g.cfg
grep -q '^fine: .*disk xvdb: .*in the guest: /dev/vdb' /tmp/doctor || fail "doctor does not say how the guest names its disks: $(cat /tmp/doctor)"
grep -q '^fine: guest-kernel: ' /tmp/doctor || fail "doctor does not judge the guest's kernel"
finds warning /tmp/g.cfg 'bytes allocated' fallocate /tmp/g.cfg
# change FROM TO: an xl file that has TO in place of FROM.
change() { sed "s|$1|$2|" /tmp/g.cfg >/tmp/changed.cfg; }
# The name by which Linux's driver of the grant device is found, which a kernel without CONFIG_XEN_VIRTIO has not.
sed 's/xen,grant-dma/xen,grant-dmx/' /payload/Image >/tmp/Image
change /payload/Image /tmp/Image
finds fault guest-kernel 'cannot grant' 'CONFIG_XEN_VIRTIO' /tmp/changed.cfg
# The page size in the flags of the image's header: 64 KiB.
cp /payload/Image /tmp/Image
printf '\x0e' | dd of=/tmp/Image bs=1 seek=24 conv=notrunc status=none
finds fault guest-kernel 'pages of 64 KiB' 'grant_usage=0' /tmp/changed.cfg
rm /tmp/Image
finds fault guest-kernel 'No such file' 'kernel = ' /tmp/changed.cfg
change /tmp/a.img /tmp/none.img
finds fault /tmp/changed.cfg none.img 'make the file' /tmp/changed.cfg
change 'access=rw, target=/tmp/a.img' 'target=/tmp/a.img, access=rw'
finds fault /tmp/changed.cfg 'access=rw' 'as it says' /tmp/changed.cfg
change 'GUEST=' 'root=/dev/xvda GUEST='
finds warning /tmp/changed.cfg 'root=/dev/xvda' 'root=' /tmp/changed.cfg

# Guests.
finds fault 'guest nobody' 'no guest nobody' 'xl list' nobody
kill -STOP $DAEMON
finds fault service 'does not answer' 'systemctl restart' nobody
kill -CONT $DAEMON
create g
said g 'verifying:' >/dev/null
make_disk /tmp/mounted.img 16
mke2fs -q -t ext4 /tmp/mounted.img
mkdir -p /mnt/mounted
losetup /dev/loop6 /tmp/mounted.img
mount /dev/loop6 /mnt/mounted
make_disk /tmp/ro.img 1
losetup -r /dev/loop7 /tmp/ro.img
guest x idle "$(by_file x <<'DEVICES'
[[device]]
type = 'blk'
path = '/tmp/a.img'
[[device]]
type = 'blk'
path = '/tmp/mounted.img'
[[device]]
type = 'blk'
path = '/dev/loop7'
[[device]]
type = 'blk'
path = '/tmp/none.img'
[[device]]
type = 'net'
mac = '00:16:3e:00:00:01'
bridge = 'br9'
[[device]]
type = 'net'
mac = '00:16:3e:00:00:02'
tap = 'tap9'
[[device]]
type = 'fs'
socket = '/run/none.sock'
tag = 'x'
DEVICES
)"
command xl create -q -p /tmp/x.cfg || fail "xl create x"
x_is_known() { xen-virtioctl list | grep -q ' x .*virtio_file/6'; }
wait_for 10 "the guest's devices" x_is_known
x() { finds fault "guest x \([0-9]+\), virtio_file/$1" "$2" "$3" x; }
x 0 'in use.*guest g' 'xl destroy'
x 1 'in use' umount
x 2 'read-only device' 'blockdev --setrw'
x 3 none.img 'make the file'
x 4 br9 'make the bridge'
x 5 tap9 'have one made for a bridge'
x 6 '/run/none.sock' 'start the back-end'
destroy x
umount /mnt/mounted
losetup -d /dev/loop6
losetup -d /dev/loop7
if whole; then
    guest y idle "disk = [ $(disk /tmp/mounted.img) ]"
    # As a kernel without CONFIG_VIRTIO_MMIO.
    sed -i 's/quiet/& initcall_blacklist=virtio_mmio_init/' /tmp/y.cfg
    create y
    said y 'guest: done' >/dev/null
    finds warning 'guest y .*virtio_disk/51712' 'no driver has begun' 'CONFIG_XEN_VIRTIO' y
    destroy y
    waits() { xen-virtioctl list | grep -q 'waits for dom0 .*No space left'; }
    wait_for 60 "the guest's disk to be full" waits
    finds warning 'guest g .*virtio_disk/51728' 'No space left' 'make room' g
    grep -q '^fine: guest g .*virtio_disk/51712: /tmp/a.img, .*running; features: .*ACCESS_PLATFORM' /tmp/doctor || fail "doctor does not say how the other disk is: $(cat /tmp/doctor)"
    kill -KILL "$(pids_of "$(domid g)")"
    wait_for 10 "the next worker" waits
    finds warning 'guest g \([0-9]+\)' 'workers of it that have died: 1' 'journalctl' g
    mount -o remount,size=24M /tmp/small
    verifies_on g
fi
destroy g
umount /tmp/small
xen-virtioctl doctor --json | python3 -c 'import json, sys; d = json.load(sys.stdin); assert d["fine"]; assert all(f["remedy"] for f in d["findings"])' || fail "doctor's JSON"
has_no_fault
nothing_left "$fds"
note "$found broken set-ups are named"
