# A source of entropy: its bytes look like chance, it needs no configuration, a guest that reads on takes no more of dom0's
# processor than it should, and it outlives its worker.
needs_libxl 4.18
configure <<'CONFIG'
[[virtio]]
guest = "fast"
index = 0
bytes-per-second = 1000000
CONFIG
start_daemon
fds=$(daemon_fds)
# entropy NAME BYTES: a guest that judges so many bytes.
entropy() {
    guest "$1" rng "virtio = [ 'type=virtio,device4, transport=mmio, grant_usage=1' ]"
    sed -i "s/GUEST=rng/& BYTES=$2/" "/tmp/$1.cfg"
    xl create -q -p "/tmp/$1.cfg"
    wait_for 10 "the device to be served" grep -q "guest $1 .*virtio/0 is entropy, at most $3 bytes a second" $DAEMON_LOG
    xl unpause "$1"
    said "$1" 'guest: source virtio_rng' >/dev/null
    said "$1" 'guest: chi-square' 90
    said "$1" 'guest: reading on' >/dev/null
    is_well "$1"
}
entropy fast 1048576 1000000
destroy fast
entropy g 16384 16384
xen-virtioctl list
before=$(report entropy_bytes) cpu=$(report cpu_ns)
sleep 10
bytes=$((($(report entropy_bytes) - before) / 10)) share=$((($(report cpu_ns) - cpu) / 100000000))
note "the guest reads $bytes bytes a second; its worker takes $share % of a processor"
[ "$bytes" -gt 8000 ] && [ "$bytes" -le 18000 ] || fail "16384 bytes a second were allowed"
[ "$share" -lt 30 ] || fail "a guest that reads keeps its worker busy"
kill -KILL "$(pids_of "$(domid g)")"
wait_for 10 "another worker" grep -q 'is lost' $DAEMON_LOG
sleep 1
before=$(report entropy_bytes)
sleep 1
[ "$(report entropy_bytes)" -gt "$before" ] || fail "nothing is read after its worker's death"
is_well g
destroy g
nothing_left "$fds"
