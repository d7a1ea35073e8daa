# dom0 has no memory for a worker's calls, now and then: its guest sees pauses, and no error.
# Long: tests/tests/shortage.rs shows it on the simulator.
faults=/sys/kernel/debug/failslab
[ -d $faults ] || fail "dom0's kernel has no CONFIG_FAILSLAB"
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
guest g no-memory "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 0 xvdb) ]"
create g
said g 'guest: round 1$' >/dev/null
worker=$(pids_of "$(domid g)")
echo Y >$faults/task-filter
echo N >$faults/ignore-gfp-wait
echo -1 >$faults/times
echo 0 >$faults/verbose
echo 1 >/proc/"$worker"/make-it-fail
waits=0
echo 10 >$faults/probability
for ((look = 0; look < 20; look++)); do
    timeout 2 xen-virtioctl list | grep -q 'waits for dom0' && waits=$((waits + 1))
    sleep 0.3
done
echo 0 >$faults/probability
note "dom0 has memory again; $(console g | tail -n1)"
said g 'guest: done' 120 >/dev/null
is_well g
[ "$(pids_of "$(domid g)")" = "$worker" ] || fail "the worker has died"
note "list said $waits times that the guest waits for dom0; $(grep -c 'for want of something in dom0' $DAEMON_LOG) lines in the log"
grep -q 'for want of something in dom0' $DAEMON_LOG || fail "no call failed: what was tested?"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
grep -q 'must reset' $DAEMON_LOG && fail "a device failed: $(grep 'must reset' $DAEMON_LOG)"
xen-virtioctl list | grep 'waits for dom0' && fail "it waits still"
destroy g
