# The service is replaced by the program at another path, and another build by this one and back, while a guest verifies its disks.
make_disk /tmp/a.img 32
make_disk /tmp/b.img 32
this=/payload/bin earlier=/payload/earlier here=$PATH
program() { sha256sum <"$1/xen-virtiod"; }
what="another build" steps="$this $earlier $this"
[ "$(program $this)" != "$(program $earlier)" ] || what="the same program at another path" steps=$this
note "what is replaced is $what"
# Another build may have another number of descriptors open: it is this one that ends the case.
PATH=$this:$here
start_daemon
fds=$(daemon_fds)
kill -TERM $DAEMON
PATH=$earlier:$here
restart_daemon
guest g verify "disk = [ $(disk /tmp/a.img), $(disk /tmp/b.img 0 xvdb) ]" "vcpus = 2" \
    "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
create g
verifies_on g
domid=$(domid g)
is_served_from() { [ "$(readlink /proc/"$(pids_of "$domid")"/exe)" = "$1/xen-virtiod" ]; }
for next in $steps; do
    kill -TERM $DAEMON
    PATH=$next:$here
    restart_daemon
    wait_for 10 "$next to take over" is_served_from $next
    verifies_on g
    # What it took over it can also go on from itself.
    kill -KILL $(pids_of "$domid")
    verifies_on g
    note "served from $next; longest pause $(longest_pause g) ms"
done
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy g
nothing_left "$fds"
