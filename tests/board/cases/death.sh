# Workers and the service are killed again and again while a guest verifies its disks.
kills=${TIMES:-$(whole && echo 30 || echo 3)}
make_disk /tmp/a.img 32
make_disk /tmp/b.img 32
start_daemon
fds=$(daemon_fds)
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 0 xvdb) ]" "vcpus = 2" \
    "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
create g
verifies_on g
domid=$(domid g)
has_worker() { pids_of "$domid" >/dev/null; }
kill_worker() {
    wait_for 20 "a worker" has_worker
    kill -KILL $(pids_of "$domid") 2>/dev/null || true
}
a_while() { sleep "$((RANDOM % 2)).$((RANDOM % 10))"; }
# First so that one death is over before the next, then whenever it comes.
for ((kill = 1; kill <= (kills + 3) / 4; kill++)); do
    sleep 1
    a_while
    kill_worker
done
verifies_on g
note "the worker killed, a second apart: $((kill - 1)) times; longest pause $(longest_pause g) ms"
for ((; kill <= kills; kill++)); do
    a_while
    kill_worker
done
verifies_on g
note "at any time: $((kills - (kills + 3) / 4)) times more; longest pause $(longest_pause g) ms"
for ((kill = 1; kill <= (kills + 9) / 10; kill++)); do
    a_while
    kill -KILL $DAEMON && restart_daemon
    a_while
    wait_for 20 "a worker" has_worker
    kill -KILL $DAEMON $(pids_of "$domid") && restart_daemon
done
verifies_on g
note "the service killed, and both: $(((kills + 9) / 10)) times each; longest pause $(longest_pause g) ms"
# As by "systemctl kill", which tells them all to end. The unit has systemd start the service again.
wait_for 20 "a worker" has_worker
kill -TERM $DAEMON $(pids_of "$domid") && restart_daemon
verifies_on g
note "all told to end: longest pause $(longest_pause g) ms"
# As the OOM killer does, which is to take the worker and not the service.
wait_for 20 "a worker" has_worker
worker=$(pids_of "$domid")
[[ $worker =~ ^[0-9]+$ ]] || fail "the guest has the workers '$worker'"
echo f >/proc/sysrq-trigger
taken() { ! kill -0 "$worker" 2>/dev/null; }
wait_for 10 "the OOM killer to take the worker" taken
kill -0 $DAEMON || fail "the OOM killer took the service"
verifies_on g
note "by the OOM killer: longest pause $(longest_pause g) ms"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy g
nothing_left "$fds"
[ -z "$(ls /run/xen-virtiod/state)" ] || fail "left behind: $(ls /run/xen-virtiod/state)"
