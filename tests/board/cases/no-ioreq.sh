# On Debian's own Xen, which has no ioreq servers, doctor says so, and a guest is refused for that reason.
# Xen: stock
# Long: what doctor finds at a host has a table of its own.
make_disk /tmp/disk.img 1
start_daemon
status=0
xen-virtioctl doctor >/tmp/doctor || status=$?
[ $status = 4 ] || fail "doctor ends with $status"
grep -A 2 '^fault: ioreq: Xen is built without ioreq servers' /tmp/doctor | grep -q 'remedy: .*CONFIG_IOREQ_SERVER=y' || fail "doctor does not say so: $(cat /tmp/doctor)"
[ "$(grep -c '^fault: ' /tmp/doctor)" = 1 ] || fail "doctor finds more faults than that: $(cat /tmp/doctor)"
note "$(grep '^fault: ' /tmp/doctor)"
guest g idle "disk = [ $(disk /tmp/disk.img) ]"
if xl create -q /tmp/g.cfg >/tmp/out 2>&1; then fail "a guest was created"; fi
refused() { xen-virtioctl doctor g | grep -A 2 'Xen gives no ioreq server' | grep -q 'remedy: .*CONFIG_IOREQ_SERVER=y'; }
wait_for 20 "doctor to say why the guest was refused: $(xen-virtioctl doctor g)" refused
