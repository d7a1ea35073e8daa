# A guest without disk= and virtio= in its xl file: a file of ours gives it a disk and a source of entropy, and a partial
# device tree tells it where they are. Both outlive their worker and the service.
make_disk /tmp/disk.img 64
mkdir -p /etc/xen-virtiod/guests
cat >/etc/xen-virtiod/guests/g.toml <<'FILE'
[[device]]
type = "blk"
path = "/tmp/disk.img"

[[device]]
type = "rng"
bytes-per-second = 1000000
FILE
xen-virtioctl check | grep 'g.toml: 2 devices'
xen-virtioctl device-tree g >/tmp/g.dts
cat /tmp/g.dts
dtc -q -I dts -O dtb -o /tmp/g.dtb /tmp/g.dts
xen-virtioctl device-tree nobody && fail "a device tree for a guest without a file"
start_daemon
fds=$(daemon_fds)
interrupts="nr_spis = 8"
# Before 4.19 there are shared interrupts only with this.
[ "$XEN_VERSION" != 4.17 ] || interrupts="vuart = 'sbsa_uart'"
guest g static "device_tree = '/tmp/g.dtb'" "$interrupts"
command xl create -q -p /tmp/g.cfg
domid=$(domid g)
is_ready() { [ "$(xenstore-read "backend/virtio_file/$domid/$1/state" 2>/dev/null)" = 2 ]; }
wait_for 10 "the disk to be served" is_ready 0
wait_for 10 "the source of entropy to be served" is_ready 1
command xl unpause g
said g 'guest: chi-square' 90
verifies_on g
xen-virtioctl list
features=$(xen-virtioctl list | grep -c ACCESS_PLATFORM)
[ "$features" = 2 ] || fail "$features of 2 devices by grants"
# What becomes of the file is none of a running guest's.
echo nonsense >/etc/xen-virtiod/guests/g.toml
kill -KILL "$(pids_of "$domid")"
verifies_on g
kill -TERM $DAEMON
restart_daemon
wait_for 10 "the guest to be taken over" grep -q 'serves it' $DAEMON_LOG
verifies_on g
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
command xl destroy g
wait_for 20 "guest g to be gone" is_gone g
wait_for 10 "its entries to be gone" bash -c "! xenstore-list backend/virtio_file/$domid 2>/dev/null | grep -q ."
nothing_left "$fds"
