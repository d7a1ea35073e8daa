# Devices come to a guest that runs and go, in its empty slots: two disks, entropy and a network one after the other, while it uses another disk; the worker and the service die between; what a driver has goes by --force only.
mount_net_tools
start_daemon
for disk in a b c; do make_disk /tmp/$disk.img 8; done
truncate -s 4M /tmp/b.img
fds=$(daemon_fds)
attached=backend/virtio_attached
ip link set lo up
# vif-bridge wants ip.
mkdir -p /usr/local/bin
printf '#!/bin/sh\nexec chroot /net-tools /usr/sbin/ip "$@"\n' >/usr/local/bin/ip
chmod +x /usr/local/bin/ip
bridge br8 10.9.0.2/24
no_interface() { ! ls /sys/class/net | grep -q '^vioa'; }
# attach …: when the guest has seen that the slot of what was taken away before is empty. It looks now and then.
attach() {
    [ -z "$taken" ] || said $name "sees its slot empty $taken" >/dev/null
    note "$(xen-virtioctl attach $name "$@" | head -n 1)"
}
# takes N: takes the device away that the guest has given back for the N-th time.
takes() {
    said $name "gave back $1" >/dev/null
    xen-virtioctl detach $name "$2" | grep -q 'taken away' || fail "$2 is not taken away"
    taken=$1
}
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=h$grants taken=''
    guest $name hot-plug "$(by_file $name <<DEVICES
[[device]]
type = 'empty'
grant-usage = $grants
[[device]]
type = 'empty'
grant-usage = $grants
DEVICES
)"
    create_by_file $name
    said $name 'has slots' >/dev/null
    xen-virtioctl list | grep -q 'empty.*waiting' || fail "an empty slot is not listed"
    xen-virtioctl doctor $name >/tmp/doctor || true
    [ "$(grep -c '^fine: guest .*virtio_file/[01]: .*waiting' /tmp/doctor)" = 2 ] || fail "doctor does not leave empty slots alone: $(cat /tmp/doctor)"
    [ "$(xen-virtioctl metrics | grep -c '^xen_virtio_device_good{.*type="empty"} 1')" = 2 ] || fail "an empty slot is not good"
    attach --slot virtio_file/1 'blk, path=/tmp/c.img'
    said $name 'has the other disk' >/dev/null
    attach 'blk, path=/tmp/a.img'
    said $name 'uses 1, a disk of 16384 sectors' >/dev/null
    ! refused=$(xen-virtioctl detach $name virtio_attached/1 2>&1) || fail "a disk that is used was taken away"
    case $refused in *'a driver has virtio_attached/1'*2000000.virtio*unbind*) ;; *) fail "$refused" ;; esac
    worker=$(pids_of "$(domid $name)")
    kill -KILL "$worker"
    wait_for 10 "the next worker" has_worker
    takes 1 virtio_attached/1
    # The service that comes has what the one before was told.
    kill -KILL "$DAEMON"
    restart_daemon
    attach 'blk, path=/tmp/b.img, read-only=false'
    said $name 'uses 2, a disk of 8192 sectors' >/dev/null
    ! xen-virtioctl attach $name rng >/tmp/refused 2>&1 || fail "a third device was attached"
    grep -q 'its 2 empty slots have devices' /tmp/refused || fail "$(cat /tmp/refused)"
    takes 2 virtio_attached/1
    attach rng
    takes 3 virtio_attached/1
    # An interface that is made goes with its device, and comes again: the second time the service dies while it goes.
    for i in 4 5; do
        attach "net, bridge=br8, mac=00:16:3e:00:00:08"
        wait_for 10 "the interface to be in its bridge" test -e "/sys/class/net/br8/brif/vioa$(domid $name).1"
        takes $i virtio_attached/1
    done
    kill -KILL "$DAEMON"
    restart_daemon
    wait_for 10 "the interface to be removed" no_interface
    ! xen-virtioctl attach $name 'blk, path=/tmp/none.img' >/tmp/refused 2>&1 || fail "no disk was attached"
    grep -q 'nothing was attached: .*none.img' /tmp/refused || fail "$(cat /tmp/refused)"
    attach 'blk, path=/tmp/a.img'
    takes 6 virtio_attached/1
    attach 'blk, path=/tmp/a.img'
    said $name 'uses what goes' >/dev/null
    sleep 1
    xen-virtioctl detach --force $name virtio_attached/1 | grep -q 'taken away' || fail "it is not taken away by force"
    said $name 'goes on' 90 >/dev/null
    note "grants $grants: $(console $name | grep -a 'verified' | head -n 1)"
    is_well $name
    xen-virtioctl list
    destroy $name
done
is_forgotten() { [ -z "$(xenstore-list /local/domain/0/$attached 2>/dev/null)" ]; }
wait_for 10 "what was attached to be forgotten" is_forgotten
ip link del br8
nothing_left "$fds"
