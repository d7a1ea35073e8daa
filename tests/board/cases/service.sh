# The service tells systemd when it is ready, idle costs nothing, and a device that is closed twice is closed once.
cat >/tmp/listen.py <<'PYTHON'
import socket
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind("/tmp/notify")
print("listening", flush=True)
print(listener.recv(4096).decode(), flush=True)
PYTHON
python3 /tmp/listen.py >/tmp/notified &
wait_for 10 "the listener" grep -q listening /tmp/notified
export NOTIFY_SOCKET=/tmp/notify
start_daemon
wait_for 5 "READY=1" grep -q 'READY=1' /tmp/notified
xen-virtioctl list | grep -q 'No guest has a virtio device' || fail "an empty list is not explained"
make_disk /tmp/disk.img 32
guest g idle "disk = [ $(disk /tmp/disk.img) ]"
create g
said g 'guest: done' >/dev/null
sleep 1
worker=$(pids_of "$(domid g)")
[ "$(cat "/proc/$worker/comm")" = "virtio-dom$(domid g)" ] || fail "the worker is called $(cat "/proc/$worker/comm")"
worker_before=$(context_switches "$worker") daemon_before=$(context_switches "$DAEMON")
seconds=$(whole && echo 10 || echo 4)
sleep "$seconds"
[ "$(context_switches "$worker")" = "$worker_before" ] || fail "an idle worker woke up $(($(context_switches "$worker") - worker_before)) times"
[ "$(context_switches "$DAEMON")" = "$daemon_before" ] || fail "an idle supervisor woke up"
[ "$(resident "$worker")" -le 6144 ] || fail "the worker takes $(resident "$worker") KiB"
[ "$(resident "$DAEMON")" -le 8192 ] || fail "the supervisor takes $(resident "$DAEMON") KiB"
note "resident: worker $(resident "$worker") KiB, supervisor $(resident "$DAEMON") KiB; no wake-up in $seconds s"
# Closed as libxl closes it, and once more before the worker has answered.
close_disk g 2
sleep 0.5
[ "$(pids_of "$(domid g)")" = "$worker" ] || fail "closing a device twice has ended its worker: $(tail -n 3 $DAEMON_LOG)"
destroy g
