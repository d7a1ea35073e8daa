# Workers are killed while their guest does nothing but access registers: each access is answered.
times=${TIMES:-10}
make_disk /tmp/disk.img 16
make_disk /tmp/ask.img 1
start_daemon
guest g traps "disk = [ $(disk /tmp/disk.img), $(disk /tmp/ask.img 1 xvdb) ]"
create g
said g 'guest: begins' >/dev/null
domid=$(domid g)
for ((kill = 1; kill <= times; kill++)); do
    sleep "0.$((RANDOM % 10))"
    wait_for 20 "a worker" eval 'pids_of "$domid" >/dev/null'
    kill -KILL $(pids_of "$domid") 2>/dev/null || true
done
printf stop | dd of=/tmp/ask.img conv=notrunc 2>/dev/null
note "$times deaths; $(said g 'guest: [0-9]+ accesses')"
said g 'guest: done' >/dev/null
note "$(said g 'verified:')"
destroy g
