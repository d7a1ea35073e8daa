# Input of our own: a keyboard of dom0's that the guest has for itself, a keyboard and a pointer that xen-virtioctl uses; keys are held while the worker dies, the driver comes and goes under load.
start_daemon
mkfifo /tmp/typing
guest-io type </tmp/typing >/tmp/typed &
exec {typing}>/tmp/typing
wait_for 5 "a keyboard" grep -q 'is there' /tmp/typed
wheel=$(grep -l 'a wheel!' /sys/class/input/event*/device/name)
wheel=/dev/input/$(basename "${wheel%/device/name}")
type_line() { echo "$1" >&$typing; }
# types: somebody types on and on, until he rests.
types() {
    while type_line ''; do sleep 0.05; done &
    typist=$!
}
rests() { kill $typist && sleep 0.5; }
fds=$(daemon_fds)
# seen N EVENTS: what the guest has seen of a device, as the N-th.
is_seen() { [ "$(count_said $name 'input: [0-9]* seen')" -ge "$1" ]; }
seen() {
    wait_for 20 "the guest to see events ($1)" is_seen "$1"
    local what
    what=$(console $name | grep -a 'input: [0-9]* seen' | sed -n "$1p")
    [ "${what#*seen: }" = "$2" ] || fail "the guest has seen '$what' in place of '$2'"
}
# waits N: the guest waits for events for the N-th time.
waits() {
    is_waiting() { [ "$(count_said $name 'input: waits')" -ge "$1" ]; }
    wait_for 30 "the guest to wait for events ($1)" is_waiting "$1"
}
kill_worker() {
    worker=$(pids_of "$(domid $name)")
    kill -KILL "$worker"
}
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=i$grants
    devices=''
    for device in "evdev = '$wheel'" "model = 'keyboard'" "model = 'pointer'"; do
        devices+="[[device]]"$'\n'"type = 'input'"$'\n'"$device"$'\n'"grant-usage = $grants"$'\n'
    done
    guest $name input "$(by_file $name <<<"$devices")"
    create_by_file $name
    waits 1
    type_line ''
    seen 1 '1:30:1 2:0:-3 1:30:0'
    waits 2
    note "$(xen-virtioctl input $name --device virtio_file/1 KEY_LEFTCTRL+KEY_C)"
    seen 2 '1:29:1 1:46:1 1:46:0 1:29:0'
    waits 3
    xen-virtioctl input $name --device virtio_file/2 ABS_X=100+ABS_Y=50 BTN_LEFT >/dev/null
    seen 3 '3:0:100 3:1:50 1:272:1 1:272:0'
    # Held while the worker dies, and let go before the next one is there, or after.
    waits 4
    type_line down
    sleep 0.5
    kill_worker
    type_line up
    wait_for 10 "the next worker" has_worker
    seen 4 '1:30:1 1:30:0'
    # Whoever has injected it may be gone.
    waits 5
    xen-virtioctl input $name --device virtio_file/1 KEY_A=1 >/dev/null
    sleep 0.5
    kill_worker
    wait_for 10 "the next worker" has_worker
    seen 5 '1:30:1 1:30:0'
    note "grants $grants: keys held over the death of the worker are let go"
    until has_said $name 'guest: bound 10 times'; do
        type_line ''
        sleep 0.05
        is_well $name
    done
    waits 6
    type_line ''
    seen 6 '1:30:1 2:0:-3 1:30:0'
    # Its worker dies while somebody types.
    said $name 'guest: reads on' >/dev/null
    types
    for ((i = 0; i < ${TIMES:-$(whole && echo 30 || echo 2)}; i++)); do
        sleep 0.3
        kill_worker
        wait_for 10 "the next worker" has_worker
    done
    rests
    # It looks for that again and again.
    until is_seen 7; do
        xen-virtioctl input $name --device virtio_file/1 KEY_A >/dev/null
        sleep 0.5
    done
    seen 7 '1:30:1 1:30:0'
    waits 8
    type_line ''
    seen 8 '1:30:1 2:0:-3 1:30:0'
    note "the worker was killed $i times while somebody typed: no key is held"
    if [ $grants = true ]; then
        # Nobody else has it: no guest, and nothing in dom0.
        guest other input "$(by_file other <<<"[[device]]
type = 'input'
evdev = '$wheel'")"
        xl create -q -p /tmp/other.cfg
        logged() { grep -q "guest other.*somebody else has $wheel" $DAEMON_LOG; }
        wait_for 10 "a word on the device that another guest has" logged
        destroy other
    fi
    xen-virtioctl input $name --device virtio_file/2 KEY_A 2>&1 | grep -q 'xen-virtio pointer has no KEY_A' || fail "a pointer's KEY_A is not refused"
    xen-virtioctl list
    is_well $name
    types
    sleep 0.5
    destroy $name
    rests
done
exec {typing}>&-
nothing_left "$fds"
