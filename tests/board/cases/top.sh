# top and trace in a real terminal (tmux), over a death of the worker and one of the service; inspect; stats; report; golden screens.
mount_net_tools
start_daemon
fds=$(daemon_fds)
cp "$(command -v xen-virtioctl)" /tmp/
tmux() { SHELL=/bin/sh LC_ALL=C.UTF-8 TERM=screen chroot /net-tools /usr/bin/tmux -f /dev/null -S /tmp/tmux "$@"; }
screen() { tmux capture-pane -p; }
shows() { screen | grep -qE "$1"; }
# golden: standard input without its figures, which are N, and without what stands them below each other.
golden() { sed -E 's/0x[0-9a-f]+/X/g; s/[0-9]+(\.[0-9]+)?(k|M|G|µs|ms|s)?/N/g; s/ +/ /g; s/ $//' | grep -v '^$'; }
# is_golden WHAT FILE: what is on standard input is as in FILE.
is_golden() { golden >/tmp/golden; busybox diff "$2" /tmp/golden || fail "$1 is not as it was"; }
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
make_disk /tmp/c.img 16
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/c.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
guest h idle "disk = [ $(disk /tmp/b.img) ]"
create g
create h
said g 'verifying:' >/dev/null
said h 'guest: done' >/dev/null
tmux new-session -d -x 118 -y 8 "/tmp/xen-virtioctl top --period 1; echo left \$?; read"
wait_for 20 "top to show rates: $(screen)" shows '^g +virtio_disk/51712 +blk +running +[1-9][0-9.]*k? '
cat >/tmp/top.golden <<'SCREEN'
guests: N, devices: N, ordered by guest
GUEST DEVICE TYPE STATE REQ/S B/S N% N% TRAPS IRQS BUSY PAGES CPU% MIB
g virtio_disk/N blk running N N N N N N N N N N
g virtio_disk/N blk running N N N N N N N N N N
h virtio_disk/N blk running N N - - N N N N N N
q leave s order / filter ↑↓ choose Enter one device Esc back
SCREEN
screen | is_golden "top" /tmp/top.golden
tmux send-keys s
wait_for 5 "another order" shows 'ordered by requests'
tmux send-keys /
tmux send-keys -l h
tmux send-keys Enter
wait_for 5 "the filter: $(screen)" shows 'filter: h'
only_h() { shows '^h ' && ! shows '^g '; }
wait_for 5 "the filtered devices: $(screen)" only_h
tmux send-keys Escape
wait_for 5 "all devices" shows '^g '
tmux resize-window -x 118 -y 30
tmux send-keys Enter
wait_for 5 "one device: $(screen)" shows '^guest g .*virtio_disk/517(12|28): blk'
wait_for 5 "its queues" shows '^ +queue 0 '
tmux send-keys Escape
wait_for 5 "all devices again" shows '^h '
kill -KILL "$(pids_of "$(domid g)")"
wait_for 20 "rates of the next worker: $(screen)" shows '^g +virtio_disk/51712 +blk +running +[1-9][0-9.]*k? '
kill -KILL $DAEMON
wait_for 10 "top to say that the service is away" shows 'does not answer'
restart_daemon
wait_for 20 "rates of the next service: $(screen)" shows '^g +virtio_disk/51712 +blk +running +[1-9][0-9.]*k? '
tmux send-keys q
wait_for 5 "top to end: $(screen)" shows '^left 0'
tmux kill-server
xen-virtioctl top </dev/null >/tmp/out 2>&1 && fail "top shows what is no terminal"
grep -q 'shows a terminal' /tmp/out || fail "top does not say what it wants: $(cat /tmp/out)"
cat >/tmp/inspect.golden <<'SCREEN'
guest h (N), virtio_disk/N: blk
 is /tmp/b.img, read-write, through domN's page cache
 state running
 page X
 worker process N; others before it have died: N
 status X ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK
 queues N, set up by the driver: N; requests under way: N
 queue N N entries: descriptors X, available X, used X; under way: N
 mapped grants: N, frames: N; addresses refused: N
 copied N bytes in N segments of N calls
SCREEN
# What the driver has negotiated, and what is counted, is not the same with every kernel.
xen-virtioctl inspect h virtio_disk/51712 | grep -vE '^  (features|requests|traps|by register|latency|its own)' | is_golden "inspect" /tmp/inspect.golden
xen-virtioctl inspect h virtio_disk/51712 | grep -qE '^  features +0x[0-9a-f]+ .*FLUSH .*ACCESS_PLATFORM' || fail "inspect does not name features"
xen-virtioctl inspect h virtio/9 2>&1 | grep -q 'has no device virtio/9, but virtio_disk/51712' || fail "inspect does not name the devices that there are"
traced() { grep -c '"what":"read"' /tmp/traced || true; }
# goes_on WHAT: ten more requests are traced.
goes_on() { local before; before=$(traced); wait_for 20 "$1: $(tail -n3 /tmp/said)" eval "[ \$(traced) -ge $((before + 10)) ]"; }
xen-virtioctl trace g virtio_disk/51712 --json >/tmp/traced 2>/tmp/said &
tracer=$!
goes_on "requests that are traced"
worker=$(pids_of "$(domid g)")
kill -KILL "$worker"
wait_for 10 "trace to say that the worker is gone" grep -q 'nothing more comes of its worker' /tmp/said
goes_on "requests of the next worker"
kill -KILL $DAEMON
goes_on "requests while the service is away"
restart_daemon
goes_on "requests of the next service"
worker=$(pids_of "$(domid g)")
pipes() { ls -l "/proc/$worker/fd" | grep -c 'pipe:'; }
with_trace=$(pipes)
tmux new-session -d -x 118 -y 8 "/tmp/xen-virtioctl trace g virtio_disk/51712 --what read --count 3; echo left \$?; read"
wait_for 20 "trace to end: $(screen)" shows '^left 0'
cat >/tmp/trace.golden <<'SCREEN'
guest g (N), virtio_disk/N: /tmp/a.img, read-write, through domN's page cache; Ctrl-C ends
 seconds took µs queue head request
 N N N N read N bytes at N
 N N N N read N bytes at N
 N N N N read N bytes at N
left N
SCREEN
screen | is_golden "trace" /tmp/trace.golden
tmux kill-server
wait $tracer && fail "a trace that was replaced ends as if it were done"
grep -q 'somebody else traces this device now' /tmp/said || fail "a trace does not say that it was replaced: $(cat /tmp/said)"
# Whoever looked on is gone, as the worker has seen at the next request.
without_trace() { [ "$(pipes)" -lt "$with_trace" ]; }
wait_for 10 "the worker to give the pipe up" without_trace
[ "$(xen-virtioctl trace g virtio_disk/51712 --slower-than 1 --queue 0 --count 2 2>/dev/null | grep -c .)" = 2 ] || fail "trace does not show two requests"
for filter in '--queue 9' '--slower-than 60000000' --failed; do
    [ -z "$(timeout 2 xen-virtioctl trace g virtio_disk/51712 $filter 2>/dev/null)" ] || fail "trace $filter shows something"
done
xen-virtioctl trace g virtio/9 2>&1 | grep -q 'it has no device virtio/9, but virtio_disk/51712' || fail "trace does not name the devices that there are"
xen-virtioctl stats | grep -q 'latency: half within' || fail "stats does not say how long requests take"
xen-virtioctl report --seconds 3 --html /tmp/report.html || fail "report ends with an error"
for part in '<td>g \([0-9]+\)</td>' 'xen-fixes|Nothing is wrong' '<polyline points=' '<rect ' 'requests, [0-9]+ KiB a second' '</html>'; do
    grep -qE "$part" /tmp/report.html || fail "the page of report has no $part: $(cat /tmp/report.html)"
done
xen-virtioctl report --seconds 1 | grep -q 'looked at: ' || fail "report in text has no findings"
note "$(xen-virtioctl stats | grep -m 1 'latency: ')"
destroy g
destroy h
nothing_left "$fds"
