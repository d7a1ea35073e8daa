# A guest makes random accesses to its device and sends it everything malformed; the other guest never notices.
make_disk /tmp/a.img 32
make_disk /tmp/b.img 32
make_disk /tmp/c.img 32
start_daemon
fds=$(daemon_fds)
guest victim verify "disk = [ $(disk /tmp/b.img) , $(disk /tmp/a.img 1 xvdb) ]"
sed -i 's/GUEST=verify/& SECS=100000/' /tmp/victim.cfg
guest hostile hostile "disk = [ $(disk /tmp/c.img) ]"
sed -i "s/GUEST=hostile/& COUNT=${TIMES:-$(whole && echo 6000 || echo 1800)} SEED=${SEED:-$RANDOM$RANDOM}/" /tmp/hostile.cfg
create victim
create hostile
verifies_on victim
note "$(said hostile 'registers:' 300)"
# What was tested: the accesses met a device that ran.
for what in starts resets stops notifies; do
    met=$(said hostile 'registers:' | sed -n "s/.*$what: \([0-9]*\).*/\1/p")
    [ "$met" -ge 10 ] || fail "only $met $what"
done
verifies_on victim
note "$(said hostile 'malformed:' 60)"
verifies_on victim
said hostile 'guest: done' 60 >/dev/null
note "hostile guest's disk afterwards: $(said hostile 'verified:')"
note "other guest: longest pause $(longest_pause victim)"
[ "$(report restarts)" = 0 ] || fail "$(report restarts) workers have died"
lines=$(wc -l <$DAEMON_LOG)
note "$lines lines in the log"
[ "$lines" -lt 40 ] || fail "the guest wrote $lines lines into dom0's log"
destroy hostile
destroy victim
nothing_left "$fds"
