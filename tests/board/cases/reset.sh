# A guest is reset with I/O in flight and comes back.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/disk.img 32
make_disk /tmp/other.img 32
guest g reboot "disk = [ $(disk /tmp/disk.img), $(disk /tmp/other.img 1 xvdb) ]" "on_reboot = 'restart'" \
    "extra = 'console=hvc0 quiet GUEST=reboot RESET=1'"
create g
said g 'resetting' >/dev/null
said g 'second boot finds I was here' >/dev/null
said g 'verified:' >/dev/null
destroy g
nothing_left "$fds"
