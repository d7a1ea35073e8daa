# qemu-storage-daemon, unmodified, serves a raw file, a qcow2 file over another, and a disk from the network; it is killed at work.
kills=${TIMES:-$(whole && echo 5 || echo 2)}
mount_back_ends
start_daemon
fds=$(daemon_fds)
socket=/run/storage.sock export=
# storage_daemon BLOCKDEV...: serves the block device that is called disk.
storage_daemon() {
    local options=() dev
    for dev; do options+=(--blockdev "$dev"); done
    back_end storage qemu-storage-daemon "${options[@]}" \
        --export "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=$socket,writable=on$export"
    wait_for 20 "qemu-storage-daemon" is_socket $socket
}
end_storage_daemon() {
    kill "${1:--TERM}" $BACK_END 2>/dev/null || true
    wait $BACK_END 2>/dev/null || true
    rm -f $socket
}
# disk_guest NAME GRANTS SECONDS
disk_guest() {
    guest "$1" verify-one "$(by_file "$1" <<<"[[device]]
type = 'blk'
socket = '$socket'
grant-usage = $2")"
    sed -i "s/GUEST=verify-one/& SECS=$3/" "/tmp/$1.cfg"
    create_by_file "$1"
}

for grants in true false; do
    [ $grants = true ] || whole || continue
    make_disk /tmp/raw.img 32
    storage_daemon "driver=file,node-name=disk,filename=/tmp/raw.img,discard=unmap"
    disk_guest $grants $grants "$(whole && echo 8 || echo 3)"
    note "raw, grants $grants: $(said $grants 'verified:' 90)"
    said $grants 'guest: discarded' >/dev/null
    note "$(said $grants 'zeroed:')"
    sees_only_ours $BACK_END
    worker=$(pids_of "$(domid $grants)")
    note "the worker maps $(mapped "$worker" gntdev) grants, $(mapped "$worker" privcmd) frames; has $(awk '/^VmRSS/ { print $2 }' "/proc/$worker/status") KiB resident"
    xen-virtioctl list
    destroy $grants
    end_storage_daemon
done

if whole; then
    # A disk from the network: a server in a network namespace of its own.
    unshare --net sleep 1000 &
    store=$!
    make_disk /tmp/remote.img 16
    in_store() { nsenter -t $store -n chroot /back-ends "$@"; }
    chroot /back-ends ip link add v0 type veth peer name v1
    chroot /back-ends ip link set v1 netns $store
    chroot /back-ends ip addr add 10.9.0.1/24 dev v0
    chroot /back-ends ip link set v0 up
    in_store ip addr add 10.9.0.2/24 dev v1
    in_store ip link set v1 up
    in_store ip link set lo up
    in_store qemu-nbd -f raw -b 10.9.0.2 -p 10809 --persistent --fork --discard=unmap /tmp/remote.img
    storage_daemon "driver=nbd,node-name=disk,server.type=inet,server.host=10.9.0.2,server.port=10809,reconnect-delay=60,discard=unmap"
    disk_guest remote true 5
    note "by NBD over TCP: $(said remote 'verified:' 90)"
    destroy remote
    end_storage_daemon
    pkill qemu-nbd
    kill $store
fi

# A qcow2 file over a raw one. What of it qemu-storage-daemon has not written yet when it is killed is lost: it is to write at once.
export=,writethrough=on
chroot /back-ends qemu-img create -q -f qcow2 -b /tmp/raw.img -F raw /tmp/over.qcow2
over=("driver=file,node-name=base-file,filename=/tmp/raw.img,read-only=on"
    "driver=file,node-name=file,filename=/tmp/over.qcow2" "driver=raw,node-name=base,file=base-file,read-only=on"
    "driver=qcow2,node-name=disk,file=file,backing=base,discard=unmap")
storage_daemon "${over[@]}"
disk_guest g true 100000
verifies_on g
kill -KILL "$(pids_of "$(domid g)")"
verifies_on g
note "the worker killed: longest pause $(longest_pause g) ms"
for ((i = 0; i < kills; i++)); do
    end_storage_daemon -KILL
    storage_daemon "${over[@]}"
    sleep "$((RANDOM % 2)).$((RANDOM % 10))"
done
verifies_on g
note "qemu-storage-daemon killed $kills times: longest pause $(longest_pause g) ms"
xen-virtioctl list
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy g
end_storage_daemon
# What it had allocated and not put to use when it was killed is lost room, and no damage: qemu-img's status 3.
chroot /back-ends qemu-img check /tmp/over.qcow2 >/tmp/check 2>&1 && status=0 || status=$?
[ $status = 0 ] || [ $status = 3 ] || fail "qemu-img check finds the qcow2 file damaged (status $status): $(tail -n 5 /tmp/check)"
note "qemu-img check: $(grep -E 'errors|leaked' /tmp/check | tail -n 1)"

if whole; then
    # A guest copies a disk of ours to a new qcow2 file over the same raw one: both then have the same data.
    rm /tmp/over.qcow2 /tmp/remote.img
    chroot /back-ends qemu-img create -q -f qcow2 -b /tmp/raw.img -F raw /tmp/over.qcow2
    noise 33 | tail -c 33554432 >/tmp/own.img
    storage_daemon "${over[@]}"
    guest copy copy "$(by_file copy <<<"[[device]]
type = 'blk'
socket = '$socket'
[[device]]
type = 'blk'
path = '/tmp/own.img'")"
    create_by_file copy
    note "$(said copy 'guest: copied' 60)"
    destroy copy
    end_storage_daemon
    chroot /back-ends qemu-img check -q /tmp/over.qcow2 || fail "qemu-img check finds the copy damaged"
    compared=$(chroot /back-ends qemu-img compare -f raw -F qcow2 /tmp/own.img /tmp/over.qcow2) || fail "the copy: $compared"
    note "qemu-img compare: $compared"
    chroot /back-ends qemu-img compare -q -f raw -F raw /tmp/own.img /tmp/raw.img && fail "the copy is the base"
    rm -f /tmp/own.img
fi
rm -f /tmp/raw.img /tmp/over.qcow2
nothing_left "$fds"
