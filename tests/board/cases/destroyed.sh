# Guests are destroyed at random moments under I/O: nothing of them is left.
# Long: shows more often, and of more, what two-guests and hung-disk show.
times=${TIMES:-2}
make_disk /tmp/a.img 16
make_disk /tmp/b.img 16
start_daemon
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 0 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=600'" \
    "memory = 64"
event_channels() { grep -c 'evtchn' /proc/interrupts; }
processes() { pgrep -fc 'xen-virtiod' || true; }
state_files() { ls /run/xen-virtiod/state | wc -l; }
held() { echo "descriptors $(daemon_fds), event channels $(event_channels), processes $(processes), state files $(state_files)"; }
# The first guest has dom0's programs open what they then keep.
for ((time = 1; time <= times + 1; time++)); do
    rm -f "$CONSOLES/guest-g.log"
    create g
    said g 'guest: verify' 60 >/dev/null
    sleep "$((RANDOM % 3)).$((RANDOM % 10))"
    during=$(held)
    destroy g
    wait_for 10 "the worker to end" no_worker
    wait_for 10 "the dead domain to go" no_zombie
    [ $time != 1 ] || before=$(held)
done
note "with a guest:          $during"
note "after one guest:       $before"
note "after $times more:      $(held)"
[ "$(held)" = "$before" ] || fail "left behind: $(held); before: $before"
