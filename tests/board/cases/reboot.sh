# A guest is rebooted by xl and finds its disk, in a domain with another number.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 32
guest g reboot "disk = [ $(disk /tmp/disk.img) ]" "on_reboot = 'restart'"
create g
said g 'left its mark' >/dev/null
first=$(domid g)
xl reboot g
said g 'second boot finds I was here' >/dev/null
said g 'verified:' >/dev/null
[ "$(domid g)" != "$first" ] || fail "the domid is still $first"
note "rebooted from domain $first to $(domid g)"
destroy g
nothing_left "$fds"
