# Long: fio's verify, while other parts of the disk are discarded and zeroed, its cache is toggled, it grows, and its worker dies; after a discard of all of it the image is small.
mount_fio
truncate -s 300M /tmp/store
mke2fs -q -t ext4 /tmp/store
mkdir -p /tmp/mnt
losetup /dev/loop5 /tmp/store
mount /dev/loop5 /tmp/mnt
image=/tmp/mnt/disk.img
truncate -s 64M $image
start_daemon
fds=$(daemon_fds)
for grants in true false; do
    name=f$grants
    truncate -s 64M $image
    guest $name fio-verify "memory = 384" "$(by_file $name <<DEVICES
[[device]]
type = 'blk'
path = '$image'
grant-usage = $grants
[[device]]
type = 'blk'
path = '$FIO'
read-only = true
grant-usage = $grants
DEVICES
)"
    sed -i "s/GUEST=fio-verify/& SECS=30/" /tmp/$name.cfg
    create_by_file $name
    said $name 'guest: verifies' >/dev/null
    for ((i = 1; i <= 8; i++)); do
        sleep 3
        truncate -s "$((64 + i))M" $image
        xen-virtioctl resize $name virtio_file/0 >/dev/null || fail "resize"
        is_well $name
        [ $((i % 4)) != 0 ] || kill -KILL "$(pids_of "$(domid $name)")"
    done
    note "grants $grants: $(said $name 'fio: v: .*err= 0' 90)"
    note "$(said $name 'issued rwts')"
    note "$(said $name 'toggled')"
    said $name 'discarded all' >/dev/null
    sync
    note "the image has $(du -k $image | cut -f 1) KiB"
    [ "$(du -k $image | cut -f 1)" -lt 9000 ] || fail "dom0 has not got the room of what was discarded"
    is_well $name
    destroy $name
done
nothing_left "$fds"
stop_daemon
umount /tmp/mnt
losetup -d /dev/loop5
rm -f /tmp/store
