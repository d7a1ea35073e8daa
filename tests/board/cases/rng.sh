# A source of entropy: its bytes look like chance, it needs no configuration, a guest that reads on takes no more of dom0's
# processor than it should, its driver comes and goes, and it outlives its worker.
start_daemon
fds=$(daemon_fds)
# judges NAME BYTES: waits until the guest has judged so many bytes.
judges() {
    said "$1" 'guest: source virtio_rng' >/dev/null
    said "$1" "guest: chi-square .* of $2 bytes" 90
    said "$1" 'guest: reading on' >/dev/null
    is_well "$1"
}
# dies NAME TIMES: its worker is killed as often while it reads.
dies() {
    name=$1
    local i before
    for ((i = 0; i < $2; i++)); do
        worker=$(pids_of "$(domid "$name")")
        kill -KILL "$worker"
        wait_for 10 "another worker" has_worker
        sleep 0.4
    done
    sleep 1
    before=$(report entropy_bytes)
    sleep 1
    [ "$(report entropy_bytes)" -gt "$before" ] || fail "nothing is read after its worker's death"
    is_well "$name"
}
guest fast rng "$(by_file fast <<<$'[[device]]\ntype = "rng"\nbytes-per-second = 1000000')"
bytes=$(whole && echo 1048576 || echo 262144)
sed -i "s/GUEST=rng/& BYTES=$bytes/" /tmp/fast.cfg
create_by_file fast
judges fast $bytes
command xl destroy fast
wait_for 20 "guest fast to be gone" is_gone fast

if whole; then
    guest frames rng "$(by_file frames <<<$'[[device]]\ntype = "rng"\nbytes-per-second = 1000000\ngrant-usage = false')"
    sed -i 's/GUEST=rng/& BYTES=65536/' /tmp/frames.cfg
    create_by_file frames
    judges frames 65536
    [ "$(report grants_mapped)" = 0 ] || fail "a device without grants has mapped some"
    dies frames 30
    command xl destroy frames
    wait_for 20 "guest frames to be gone" is_gone frames
fi

# Without configuration: by xl where it knows virtio =.
if [ "$XEN_VERSION" = 4.17 ]; then
    guest g rng "$(by_file g <<<$'[[device]]\ntype = "rng"')"
    sed -i 's/GUEST=rng/& BYTES=16384/' /tmp/g.cfg
    create_by_file g
else
    guest g rng "virtio = [ 'type=virtio,device4, transport=mmio, grant_usage=1' ]"
    sed -i 's/GUEST=rng/& BYTES=16384/' /tmp/g.cfg
    xl create -q -p /tmp/g.cfg
    wait_for 10 "the device to be served" grep -q 'virtio/0: is entropy' $DAEMON_LOG
    xl unpause g
fi
judges g 16384
xen-virtioctl list
before=$(report entropy_bytes) cpu=$(report cpu_ns)
seconds=$(whole && echo 10 || echo 5)
sleep "$seconds"
bytes=$((($(report entropy_bytes) - before) / seconds)) share=$((($(report cpu_ns) - cpu) / (seconds * 10000000)))
note "the guest reads $bytes bytes a second; its worker takes $share % of a processor"
[ "$bytes" -gt 8000 ] && [ "$bytes" -le 18000 ] || fail "16384 bytes a second were allowed"
# One that does not sleep takes nearly all; how much a request takes varies by half with the machine that emulates.
[ "$share" -lt 60 ] || fail "a guest that reads keeps its worker busy"
dies g "$(whole && echo 30 || echo 1)"
command xl destroy g
wait_for 20 "guest g to be gone" is_gone g
nothing_left "$fds"
