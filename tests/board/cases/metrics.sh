# metrics tells of a guest that does I/O, at a loopback address and a Unix socket, to Prometheus itself; who asks wrongly is answered or left.
name=g
start_daemon
fds=$(daemon_fds)
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
guest $name verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
create $name
said $name 'verifying:' >/dev/null
cat >/tmp/ask.py <<'PYTHON'
# ask.py ADDRESS REQUEST: prints the answer of whoever listens there.
import socket, sys
address, request = sys.argv[1:]
if address.startswith("/"):
    asked = socket.socket(socket.AF_UNIX)
    asked.connect(address)
else:
    host, port = address.rsplit(":", 1)
    asked = socket.create_connection((host, int(port)))
asked.sendall(request.encode())
while answer := asked.recv(65536):
    sys.stdout.write(answer.decode())
PYTHON
ask() { python3 /tmp/ask.py "$@" | tr -d '\r'; }
# Nobody else has wanted it up.
busybox ifconfig lo 127.0.0.1 up
GET=$'GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n'
xen-virtioctl metrics --listen 127.0.0.1:9809 &
tcp=$!
xen-virtioctl metrics --listen /run/metrics.sock &
unix=$!
answers() { ask "$1" "$GET" 2>/dev/null | head -n 1 | grep -q ' 200 OK'; }
wait_for 10 "an answer at the address" answers 127.0.0.1:9809
wait_for 10 "an answer at the socket" answers /run/metrics.sock
# of FAMILY: its number of the guest's device.
of() { ask 127.0.0.1:9809 "$GET" | sed -n "s/^$1{.*guest=\"$name\".*} //p" | head -n 1; }
before=$(of xen_virtio_device_requests_total)
timed=$(of xen_virtio_request_latency_seconds_count)
verifies_on $name
after=$(of xen_virtio_device_requests_total)
[ "$after" -gt "$before" ] || fail "no request was counted: $before, $after"
[ "$(of xen_virtio_request_latency_seconds_count)" -gt "$timed" ] || fail "no request was timed"
note "requests: $before, then $after; $(xen-virtioctl inspect $name "$(xen-virtioctl list | awk '/running/ { print $3; exit }')" | grep latency)"
ask 127.0.0.1:9809 $'GET / HTTP/1.1\r\n\r\n' | grep -q '^HTTP/1.1 404' || fail "there is something at /"
# Somebody who says nothing is left, and the next one has an answer.
python3 -c 'import socket, time; s = socket.create_connection(("127.0.0.1", 9809)); time.sleep(600)' &
silent=$!
sleep 0.5
ask 127.0.0.1:9809 "$GET" | grep -q '^# EOF' || fail "somebody who says nothing holds others up"
kill $silent
if whole; then
    mount_prometheus
    xen-virtioctl metrics --format prometheus >/tmp/metrics
    chroot /prometheus /usr/bin/promtool check metrics </tmp/metrics || fail "promtool finds something wrong"
    cat >/tmp/prometheus.yml <<'YAML'
global:
  scrape_interval: 2s
scrape_configs:
  - job_name: xen-virtio
    static_configs:
      - targets: [ "127.0.0.1:9809" ]
YAML
    mkdir -p /tmp/prometheus-data
    chroot /prometheus /usr/bin/prometheus --config.file=/tmp/prometheus.yml --storage.tsdb.path=/tmp/prometheus-data \
        --web.listen-address=127.0.0.1:9090 >/tmp/prometheus.log 2>&1 &
    prometheus=$!
    query() { python3 -c 'import json, sys, urllib.parse, urllib.request
url = "http://127.0.0.1:9090/api/v1/query?query=" + urllib.parse.quote(sys.argv[1])
print(len(json.load(urllib.request.urlopen(url))["data"]["result"]))' "$1" 2>/dev/null; }
    has_data() { [ "$(query "$1")" -gt 0 ]; }
    wait_for 90 "Prometheus to have scraped: $(tail -n 3 /tmp/prometheus.log)" has_data 'rate(xen_virtio_device_requests_total[10s]) > 0'
    # Each query of the dashboard has data.
    python3 -c 'import json
for panel in json.load(open("/payload/dashboard.json"))["panels"]:
    for target in panel.get("targets", []):
        print(target["expr"])' >/tmp/queries
    while read -r expression; do
        wait_for 20 "data for $expression" has_data "${expression//\$__rate_interval/10s}"
    done </tmp/queries
    note "Prometheus has data for $(wc -l </tmp/queries) queries of the dashboard"
    kill $prometheus
fi
kill $DAEMON
wait $DAEMON || true
# The last answer is given again for a second.
tells_of_none() { ask 127.0.0.1:9809 "$GET" | grep '^HTTP/1.1 503' >/dev/null; }
wait_for 10 "an answer that says that no service runs" tells_of_none
restart_daemon
wait_for 10 "an answer again" answers 127.0.0.1:9809
kill $tcp $unix
destroy $name
