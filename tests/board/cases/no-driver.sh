# A guest whose kernel never begins with its device is told of in list and in the log.
# Long: takes two minutes.
make_disk /tmp/disk.img 16
start_daemon
guest g idle "disk = [ $(disk /tmp/disk.img) ]"
# As a kernel without CONFIG_VIRTIO_MMIO.
sed -i 's/quiet/& initcall_blacklist=virtio_mmio_init/' /tmp/g.cfg
create g
said g 'guest: done' >/dev/null
told() { grep -qE 'guest g .*no driver has begun with it, 2 minutes' $DAEMON_LOG; }
wait_for 140 "the log to say that there is no driver" told
xen-virtioctl list | grep 'CONFIG_XEN_VIRTIO' || fail "list does not say it"
note "$(grep 'no driver has begun' $DAEMON_LOG)"
destroy g
