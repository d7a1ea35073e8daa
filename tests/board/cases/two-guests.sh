# Two guests with two disks each, two vCPUs and a queue for each; one is destroyed in the middle of its I/O.
# Long: hung-disk has a guest destroyed beside one with two queues, and the simulator's tests have two drivers at once.
start_daemon
fds=$(daemon_fds)
for name in a b; do
    for disk in 1 2; do make_disk /tmp/$name$disk.img 32; done
    guest $name verify "disk = [ $(disk /tmp/${name}1.img), $(disk /tmp/${name}2.img 1 xvdb) ]" \
        "vcpus = 2" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
    create $name
done
for name in a b; do said $name 'verifying:' 60 >/dev/null; done
[ "$(said b 'guest: . CPUs')" = "guest: 2 CPUs, queues: 2 and 2" ] || fail "b: $(said b 'guest: . CPUs')"
worker=$(pids_of "$(domid a)")
[ "$(report ready_queues)" = 8 ] || fail "$(report ready_queues) queues run instead of 8"
xl destroy a
note "a destroyed in the middle of its I/O"
wait_for 20 "guest a to be gone" is_gone a
wait_for 10 "the worker of a to end" bash -c "! kill -0 $worker 2>/dev/null"
wait_for 10 "dead domains to go" no_zombie
verifies_on b
note "b: $(said b 'verifying:')"
[ "$(report request_errors)" = 0 ] || fail "$(report request_errors) failed requests"
destroy b
nothing_left "$fds"
