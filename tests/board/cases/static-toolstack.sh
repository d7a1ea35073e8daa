# A guest without disk= and virtio= in its xl file: a file of ours gives it a disk and a source of entropy, and a partial
# device tree tells it where they are. Both outlive their worker and the service.
# Long: the cases of back-ends have their devices by files too.
make_disk /tmp/disk.img 64
start_daemon
fds=$(daemon_fds)
guest g static-toolstack "$(by_file g <<'FILE'
[[device]]
type = "blk"
path = "/tmp/disk.img"

[[device]]
type = "rng"
bytes-per-second = 1000000
FILE
)"
xen-virtioctl check | grep 'g.toml, virtio_file/1: '
xen-virtioctl device-tree nobody && fail "a device tree for a guest without a file"
create_by_file g
domid=$(domid g)
said g 'guest: chi-square' 90
verifies_on g
xen-virtioctl list
features=$(xen-virtioctl list | grep -c ACCESS_PLATFORM)
[ "$features" = 2 ] || fail "$features of 2 devices by grants"
# What becomes of the file is none of a running guest's.
echo nonsense >/etc/xen-virtiod/guests/g.toml
xen-virtioctl check && fail "nonsense passed for a guest's file"
kill -KILL "$(pids_of "$domid")"
verifies_on g
kill -TERM $DAEMON
restart_daemon
wait_for 10 "the guest to be taken over" grep -q 'serves it' $DAEMON_LOG
verifies_on g
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
command xl destroy g
wait_for 20 "guest g to be gone" is_gone g
has_entries() { xenstore-list "backend/virtio_file/$domid" >/dev/null 2>&1; }
has_none() { ! has_entries; }
wait_for 10 "its entries to be gone" has_none
nothing_left "$fds"
