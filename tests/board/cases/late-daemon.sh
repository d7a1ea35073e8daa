# A guest that is created before xen-virtiod runs waits for it, and is served on when that ends.
for disk in a b; do make_disk /tmp/$disk.img 16; done
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=idle'"
xl create -q /tmp/g.cfg &
creating=$!
wait_for 10 "xl to write the entry" xenstore-exists /local/domain/0/backend/virtio_disk
sleep 1
start_daemon
wait $creating || fail "xl create failed"
said g '/dev/vdb' >/dev/null
said g 'guest: done' >/dev/null
# Without the service a worker serves on, and ends with its guest.
kill $DAEMON
wait_for 5 "xen-virtiod to end" bash -c "! kill -0 $DAEMON 2>/dev/null"
destroy g
wait_for 10 "the orphaned worker to end" no_worker
