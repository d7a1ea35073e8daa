# A qcow2 image by one line: the service starts qemu-storage-daemon for it, as a user of its own, and again when it is killed.
# Long: storage-daemon shows what qemu-storage-daemon does, and virtiofsd how the service keeps programs running.
mount_back_ends
# The program where Debian has it, with the libraries of its own root.
libraries=/back-ends/usr/lib/aarch64-linux-gnu
printf '#!/bin/bash\nexec %s\n' "$libraries/ld-linux-aarch64.so.1 --library-path $libraries /back-ends/usr/bin/qemu-storage-daemon \"\$@\"" \
    >/usr/bin/qemu-storage-daemon
chmod +x /usr/bin/qemu-storage-daemon
no_program() { ! pgrep -U 4711 >/dev/null; }
start_daemon
fds=$(daemon_fds)
for grants in true false; do
    chroot /back-ends qemu-img create -q -f qcow2 /tmp/disk.qcow2 32M
    chown 4711 /tmp/disk.qcow2
    guest $grants verify-one "$(by_file $grants <<<"[[device]]
type = 'blk'
path = '/tmp/disk.qcow2'
format = 'qcow2'
user = '4711'
grant-usage = $grants")"
    sed -i "s/GUEST=verify-one/& SECS=8/" /tmp/$grants.cfg
    create_by_file $grants
    said $grants 'verifying:' >/dev/null
    sees_only_ours "$(pgrep -U 4711 | tail -n 1)"
    pkill -KILL -U 4711
    note "grants $grants: $(said $grants 'verified:' 90)"
    xen-virtioctl list
    is_well $grants
    destroy $grants
    wait_for 10 "the program to end" no_program
    # 3: sound, with clusters that nobody uses, which a killed program had taken.
    checked=0
    chroot /back-ends qemu-img check -q /tmp/disk.qcow2 >/tmp/check || checked=$?
    [ $checked = 0 ] || [ $checked = 3 ] || fail "the image is damaged: $(tail -n 3 /tmp/check)"
    note "$(chroot /back-ends qemu-img info /tmp/disk.qcow2 | grep 'disk size')"
done
rm -f /usr/bin/qemu-storage-daemon
nothing_left "$fds"
