# A guest discards and zeroes parts of its disk, with a write cache and without: dom0 has the room, its worker dies meanwhile; a disk that is to keep its room does.
# A file system that has both kinds of fallocate(2), which tmpfs has not.
truncate -s 200M /tmp/store
mke2fs -q -t ext4 /tmp/store
mkdir -p /tmp/mnt
losetup /dev/loop5 /tmp/store
mount /dev/loop5 /tmp/mnt
start_daemon
fds=$(daemon_fds)
kept() { du -k "$1" | cut -f 1; }
truncate -s 64M /tmp/mnt/disk.img
guest g discard "disk = [ $(disk /tmp/mnt/disk.img) ]"
sed -i "s/GUEST=discard/& ROUNDS=$(whole && echo 40 || echo 12)/" /tmp/g.cfg
create g
said g 'guest: written' >/dev/null
before=$(kept /tmp/mnt/disk.img)
said g 'guest: discarded' >/dev/null
sync
after=$(kept /tmp/mnt/disk.img)
note "of $before KiB the image has $after once 24 MiB were discarded"
[ "$after" -lt $((before - 20000)) ] || fail "dom0 has not got the room of what the guest has discarded"
note "$(said g 'zeroed:')"
# The worker dies while the guest discards and zeroes on.
for ((i = 0; i < $(whole && echo 5 || echo 2); i++)); do
    sleep 0.7
    kill -KILL "$(pids_of "$(domid g)")"
done
note "$(said g "guest: blocks of $(stat -c %o /tmp/mnt/disk.img), write back")"
note "$(said g 'guest: rounds' 60)"
destroy g
if whole; then
    # A block device.
    truncate -s 64M /tmp/mnt/loop.img
    losetup /dev/loop6 /tmp/mnt/loop.img
    guest l discard "disk = [ $(disk /dev/loop6) ]"
    create l
    note "a loop device: $(said l 'zeroed:')"
    said l 'guest: rounds' 60 >/dev/null
    destroy l
    losetup -d /dev/loop6
fi
# A disk that is to keep its room.
truncate -s 16M /tmp/mnt/kept.img
configure <<'CONFIG'
[[disk]]
path = "/tmp/mnt/kept.img"
discard = false
CONFIG
kill $DAEMON && restart_daemon
guest k discard "disk = [ $(disk /tmp/mnt/kept.img) ]"
create k
said k 'guest: has no discard' >/dev/null
destroy k
nothing_left "$fds"
stop_daemon
rm -f /etc/xen-virtiod/config.toml
umount /tmp/mnt
losetup -d /dev/loop5
rm -f /tmp/store
