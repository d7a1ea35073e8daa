# A guest is rebooted by xl, another is reset with I/O in flight: both find their disks, in domains with other numbers.
start_daemon
# Who makes a rebooted guest anew is libxl itself, and that of 4.17 by frames only.
[ "$XEN_VERSION" = 4.17 ] && grants=0 || grants=1
fds=$(daemon_fds)
for disk in g r other; do make_disk /tmp/$disk.img 32; done
guest g reboot "disk = [ $(disk /tmp/g.img $grants) ]" "on_reboot = 'restart'"
guest r reboot "disk = [ $(disk /tmp/r.img $grants), $(disk /tmp/other.img $grants xvdb) ]" "on_reboot = 'restart'" \
    "extra = 'console=hvc0 quiet GUEST=reboot RESET=1'"
create g
create r
said g 'left its mark' >/dev/null
first=$(domid g)
xl reboot g
said r 'resetting' >/dev/null
for name in g r; do
    said $name 'second boot finds I was here' >/dev/null
    said $name 'verified:' >/dev/null
done
[ "$(domid g)" != "$first" ] || fail "the domid is still $first"
note "rebooted from domain $first to $(domid g)"
destroy g
destroy r
nothing_left "$fds"
