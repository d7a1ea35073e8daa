# A disk that a guest writes is refused to any other user, by whatever name, in a line that names the first; sharing is said on purpose.
# Long: doctor has a disk of another guest and one that dom0 has mounted refused; the uses of a disk have tests of their own.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
ln /tmp/a.img /tmp/hard-link.img
losetup /dev/loop1 /tmp/b.img
guest a verify "disk = [ $(disk /tmp/a.img), $(disk /dev/loop1 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
create a
verifies_on a
# refused NAME PATH PATTERN: a guest that is created with the disk is not served, for a reason that matches.
refused() {
    guest "$1" idle "disk = [ $(disk "$2") ]"
    xl create -q "/tmp/$1.cfg" >/dev/null 2>&1 &
    wait_for 20 "the log to say why $1 is refused" grep -qE "guest $1 .*$3" $DAEMON_LOG
    note "$(grep -E "guest $1 .*$3" $DAEMON_LOG | tail -n1)"
    # libxl would wait for ten seconds more.
    xl destroy "$1"
    wait $! && fail "guest $1 was created"
    xen-virtioctl list | grep -qE "guest $1 .*$3" || fail "xen-virtioctl list does not show why $1 was refused: $(xen-virtioctl list)"
}
refused link /tmp/hard-link.img 'guest a .* has it as /tmp/a.img'
verifies_on a
# By the file of a loop device, and by a file system that dom0 has mounted.
if whole; then
    refused file /tmp/b.img 'it is the file of /dev/loop1'
    truncate -s 16M /tmp/mounted.img
    mke2fs -q -t ext4 /tmp/mounted.img
    losetup /dev/loop2 /tmp/mounted.img
    mkdir -p /tmp/mounted
    mount /dev/loop2 /tmp/mounted
    refused mounted /dev/loop2 'dom0 has it mounted at /tmp/mounted'
    umount /tmp/mounted
fi
# The first user goes, and the next one has its turn.
guest next verify "disk = [ $(disk /tmp/a.img), $(disk /dev/loop1 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=2'"
destroy a
create next
said next 'guest: done' >/dev/null
note "$(said next 'verified:')"
destroy next
nothing_left "$fds"
# On purpose.
whole || exit 0
stop_daemon
shared /tmp/hard-link.img | configure
start_daemon
for name in c d; do
    guest $name idle "disk = [ $(disk /tmp/a.img) ]"
    create $name
    said $name 'guest: done' >/dev/null
done
note "two guests share a disk that is said to be shared"
