# Consoles: xen-virtioctl in a real terminal (tmux), a pty, a socket, a log with rotation, a channel; nobody reads, the terminal's size changes, the worker and the service die.
mount_net_tools
start_daemon
fds=$(daemon_fds)
cp "$(command -v xen-virtioctl)" /tmp/
socat() { timeout 30 chroot /net-tools /usr/bin/socat "$@"; }
tmux() { SHELL=/bin/sh LC_ALL=C.UTF-8 TERM=linux chroot /net-tools /usr/bin/tmux -f /dev/null -S /tmp/tmux "$@"; }
screen() { tmux capture-pane -p; }
shows() { screen | grep -qE "$1"; }
# type TEXT: types it in the terminal, and Enter.
type() { tmux send-keys -l "$1" && tmux send-keys Enter; }
# answers TEXT LINE: what the guest says to it.
answers() { type "$1" && wait_for 10 "the terminal to show $2: $(screen)" shows "$2"; }
kill_worker() {
    worker=$(pids_of "$(domid $name)")
    kill -KILL "$worker"
    wait_for 10 "the next worker" has_worker
}
# As it is in the files, the older one first.
whole_log() { cat /tmp/console.log.1 /tmp/console.log 2>/dev/null | tr -d '\r'; }
# has_logged LINE: it is among the last of the log. Looking at all of it would take the processor from what is looked at.
has_logged() { tail -qc 200 /tmp/console.log.1 /tmp/console.log 2>/dev/null | tr -d '\r' | grep -qxE "$1"; }
cat >/tmp/compare.py <<'PYTHON'
# compare.py LINES DEATHS: whether the log has all that the guest has written, in its order. A worker that has died between writing some
# of it and noting that has the next one write it once more: 4 KiB at most a death, in the middle of a line as well.
import sys
lines, deaths = map(int, sys.argv[1:])
expected = "begun 5001\n" + "".join(f"{line}\n" for line in range(1, lines + 1)) + "all 4001\n"
logged = open("/tmp/logged").read()
logged = logged[logged.index("begun 5001\n") : logged.rindex("all 4001\n") + len("all 4001\n")]
# Where in what is expected the next character may be, and how often it was begun anew before that.
places = {0: 0}
for at, char in enumerate(logged):
    ahead = {place + 1: times for place, times in places.items() if expected[place : place + 1] == char}
    if not ahead:
        for place, times in places.items():
            for back in range(1, 4097):
                if back <= place and expected[place - back] == char:
                    ahead.setdefault(place - back + 1, times + 1)
    if not ahead:
        sys.exit(f"at byte {at}: {logged[max(0, at - 80) : at]!r}, then {logged[at : at + 80]!r}")
    places = ahead
times = places.get(len(expected))
if times is None or times > deaths:
    sys.exit(f"begun anew {times} times")
print(f"some of them twice {times} times")
PYTHON
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=c$grants
    rm -f /tmp/console.log*
    guest $name console "$(by_file $name <<DEVICES
[[device]]
type = 'console'
grant-usage = $grants
pty = '/run/console'
listen = '/run/console.sock'
log = '/tmp/console.log'
log-kib = 1024
[[device]]
type = 'console'
grant-usage = $grants
ports = [{ name = 'echo', listen = '/run/echo.sock' }, { log = '/tmp/third.log' }]
DEVICES
)"
    sed -i "s/GUEST=console/& CONSOLES=hvc1/" "/tmp/$name.cfg"
    create_by_file $name
    note "grants $grants: $(said $name 'guest: consoles')"
    # A terminal.
    tmux new-session -d -x 90 -y 20 "/tmp/xen-virtioctl console $name --device virtio_file/0; echo left \$?; read"
    wait_for 10 "a prompt" shows '#'
    answers 'echo $((6 * 7))' '^42'
    answers 'stty size' '^20 90'
    tmux resize-window -x 100 -y 25
    answers 'stty size' '^25 100'
    # Over the deaths of its worker, and of the service.
    for ((i = 0; i < ${TIMES:-$(whole && echo 10 || echo 2)}; i++)); do
        kill_worker
        answers "echo after \$((1000 + $i))" "^after $((1000 + i))"
    done
    kill -KILL $DAEMON && restart_daemon
    answers 'stty size; echo and $((2000 + 1))' '^and 2001'
    tmux send-keys C-]
    wait_for 10 "xen-virtioctl to end: $(screen)" shows '^left 0'
    tmux kill-server
    # What was there before is shown to whoever comes, by a pipe, by the socket and by the pty.
    ! whole || [ "$(echo 'echo $((2000 + 2))' | timeout 20 xen-virtioctl console $name --device virtio_file/0 2>/dev/null | tr -d '\r' | grep -cxE '42|after 1000|2002')" = 3 ] || fail "the pipe"
    [ "$(echo 'echo $((3000 + 2))' | socat -t 3 - UNIX-CONNECT:/run/console.sock | tr -d '\r' | grep -cxE '42|after 1000|3002')" = 3 ] || fail "the socket"
    [ "$( (sleep 1; echo 'echo $((3000 + 3))'; sleep 2) | socat -t 3 - /run/console,raw,echo=0 | tr -d '\r' | grep -cxE '42|after 1000|3003')" = 3 ] || fail "the pty"
    # Its driver comes and goes while somebody types, and while the guest writes.
    if whole; then
        # Whoever writes to a device that has just gone would make a file in its place, and the next one could not come there.
        script='mount -o remount,bind,ro /dev; for i in 1 2 3 4 5 6 7 8 9 10; do
for port in /sys/class/virtio-ports/*; do [ "$(cat $port/name)" = echo ] && seq 1 5000 >/dev/${port##*/} 2>/dev/null & done
sleep 0.1; echo virtio1 >unbind; echo virtio1 >bind; done
# One that was late has the channel of the last binding, which nobody else can open then.
kill $(jobs -p); killall seq; wait'
        socat -u UNIX-CONNECT:/run/echo.sock - >/tmp/written &
        (for i in 1 2 3 4 5 6 7 8 9 10; do echo; sleep 0.2; done) | timeout 20 xen-virtioctl console $name --device virtio_file/1 >/dev/null 2>&1 &
        rebinding=$!
        echo "(cd /sys/bus/virtio/drivers/virtio_console; $script); echo bound \$((3000 + 4))" | socat -t 5 - UNIX-CONNECT:/run/console.sock | tr -d '\r' | grep -qx 'bound 3004' || fail "the driver's coming and going"
        wait $rebinding
        [ -s /tmp/written ] || fail "the guest has written nothing meanwhile"
    fi
    # Nobody reads; the worker dies meanwhile. The log has all of it.
    # In so many pieces, that it lasts as long as the deaths do.
    pieces=$(whole && echo 20 || echo 10) lines=$(whole && echo 10000 || echo 2000)
    # What is typed while its worker dies is lost (docs/devices/console.md): the first one is not to die before the shell has begun.
    echo "echo begun \$((5000 + 1)); for i in \$(seq 0 $((pieces - 1))); do seq \$((i * $((lines / pieces)) + 1)) \$(((i + 1) * $((lines / pieces)))); sleep 0.4; done; echo all \$((4000 + 1))" | socat -u - UNIX-CONNECT:/run/console.sock
    has_begun() { whole_log | grep -q 'begun 5001'; }
    wait_for 20 "the shell to begin" has_begun
    for ((i = 0; i < ${TIMES:-$(whole && echo 30 || echo 2)}; i++)); do
        sleep 0.3
        kill_worker
    done
    ! has_logged '.*all 4001' || fail "the stream was over before the last death"
    is_within 120 has_logged '.*all 4001' || fail "the log has not all: $(tail -qc 200 /tmp/console.log)"
    whole_log >/tmp/logged
    compared=$(python3 /tmp/compare.py "$lines" "$i" 2>&1) || fail "the log is not what the guest has written: $compared"
    note "$lines lines are in the log, $compared over $i deaths"
    # A channel. What is typed before the shell reads again, it may throw away.
    has_prompt() { tail -qc 20 /tmp/console.log | grep -aq '# '; }
    wait_for 20 "the shell's prompt" has_prompt
    echo 'sh /guest/echo &' | socat -u - UNIX-CONNECT:/run/console.sock
    head -c $(whole && echo 200000 || echo 50000) /dev/urandom >/tmp/sent
    (cat /tmp/sent; sleep $(whole && echo 8 || echo 4)) | socat -t 1 - UNIX-CONNECT:/run/echo.sock >/tmp/echoed
    busybox cmp /tmp/sent /tmp/echoed || fail "the channel: $(stat -c %s /tmp/echoed) bytes came back"
    xen-virtioctl list
    is_well $name
    # Under load.
    echo 'while :; do seq 1 1000; done &' | socat -u - UNIX-CONNECT:/run/console.sock
    sleep 1
    destroy $name
    [ ! -e /run/console.sock ] && [ ! -L /run/console ] || fail "something is left of the console"
done
nothing_left "$fds"
