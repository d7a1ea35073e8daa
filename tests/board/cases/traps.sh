# Workers are killed while their guest does nothing but access registers: each access is answered.
times=${TIMES:-10}
make_disk /tmp/disk.img 16
start_daemon
guest g traps "disk = [ $(disk /tmp/disk.img) ]"
sed -i "s/GUEST=traps/& COUNT=$((times * 3000))/" /tmp/g.cfg
create g
said g 'guest: begins' >/dev/null
domid=$(domid g)
for ((kill = 1; kill <= times; kill++)); do
    sleep "0.$((RANDOM % 10))"
    has_said g 'registers:' && fail "the guest was done after $kill deaths"
    wait_for 20 "a worker" eval 'pids_of "$domid" >/dev/null'
    kill -KILL $(pids_of "$domid") 2>/dev/null || true
done
note "$times deaths; $(said g 'registers:' 200)"
said g 'guest: done' >/dev/null
note "$(said g 'verified:')"
destroy g
