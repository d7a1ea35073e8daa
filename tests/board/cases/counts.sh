# a request costs no more traps, interrupts and copies than it should
make_disk /tmp/disk.img 64
losetup /dev/loop0 /tmp/disk.img

# at_most COUNT LIMIT: COUNT a request is at most LIMIT.
at_most() {
    awk -v count="$(report "$1")" -v requests="$(report requests)" -v limit="$2" -v what="$1" 'BEGIN {
        printf "  %s %.3f a request (at most %s)\n", what, count / requests, limit
        exit count > limit * requests
    }' || fail "too many $1"
}

# The guest's kernel reads the partition table, which is a request or two of its own.
polling 0
start_daemon
bench qd1 4k-qd1-randread 1 2 vda "disk = [ $(disk /dev/loop0) ]"
note "4k-qd1-randread, polling off"
at_most kicks 1.02
at_most interrupts 1.02
at_most copy_batches 2.05
destroy qd1
stop_daemon

polling 1000
start_daemon
for pattern in 4k-qd16-randwrite $(whole && echo 4k-qd16-randread); do
    bench $pattern $pattern 1 2 vda "disk = [ $(disk /dev/loop0) ]"
    note "$pattern"
    at_most kicks 0.2
    at_most interrupts 0.2
    at_most copy_batches 0.3
    xen-virtioctl stats | sed 's/^/  /'
    destroy $pattern
done
