# A disk in the other form that libxl writes, virtio = [ … ], with its path in the configuration.
needs_libxl 4.18
make_disk /tmp/disk.img 32
expected=$(md5sum </tmp/disk.img | cut -d' ' -f1)
mkdir -p /etc/xen-virtiod
cat >/etc/xen-virtiod/config.toml <<'CONFIG'
[[virtio]]
guest = "g"
index = 0
path = "/tmp/disk.img"
read-only = true
CONFIG
start_daemon
fds=$(daemon_fds)
guest g read-only "virtio = [ 'type=virtio,device2, transport=mmio, grant_usage=1', 'type=virtio,device22, transport=mmio, grant_usage=1' ]"
# xl waits for nothing with this form: the guest may run when its disk is there.
xl create -q -p /tmp/g.cfg
wait_for 10 "the disk to be served" grep -q 'virtio/0: is /tmp/disk.img, read-only' $DAEMON_LOG
wait_for 10 "the other device to be refused" grep -q 'virtio/1: .*not virtio,device22' $DAEMON_LOG
xen-virtioctl list
destroy g
guest g read-only "virtio = [ 'type=virtio,device2, transport=mmio, grant_usage=1' ]"
xl create -q -p /tmp/g.cfg
wait_for 10 "the disk to be served" bash -c "[ \$(grep -c 'virtio/0: is /tmp/disk.img' $DAEMON_LOG) = 2 ]"
xl unpause g
said g 'guest: done' >/dev/null
[ "$(said g 'guest: checksum')" = "guest: checksum $expected" ] || fail "the guest read another disk than dom0 wrote"
said g 'guest: a write fails' >/dev/null
[ "$(md5sum </tmp/disk.img | cut -d' ' -f1)" = "$expected" ] || fail "a read-only disk was written"
destroy g
nothing_left "$fds"
