# A driver that cannot get on is told so in list and in the log, with the likely reason, and gets on when it does right.
make_disk /tmp/disk.img 16
make_disk /tmp/ask.img 1
start_daemon
fds=$(daemon_fds)
guest g drivers "disk = [ $(disk /tmp/disk.img), $(disk /tmp/ask.img 1 xvdb) ]"
create g
ask() { printf '%-512s' "$1" | dd of=/tmp/ask.img conv=notrunc 2>/dev/null; }
# told STEP PATTERN: list and log say so.
told() {
    ask "$1"
    said g "guest: did $1" >/dev/null
    xen-virtioctl list | grep -E "$2" >/tmp/told || fail "list does not say '$2': $(xen-virtioctl list)"
    note "$(cat /tmp/told)"
    grep -qE "guest g \([0-9]+\): .*$2" $DAEMON_LOG || fail "the log does not say '$2'"
}
told order 'must be set first'
told features 'CONFIG_XEN_VIRTIO'
told early-queue 'queue 0 ready before FEATURES_OK'
told no-queue 'DRIVER_OK with no queue ready'
told wrong-grants '64 KiB pages'
ask bind
said g 'guest: done' >/dev/null
is_well g
xen-virtioctl list | grep -E 'must be set first|no queue ready|64 KiB' && fail "list still shows a misstep of a driver that got on"
note "$(said g 'verified:')"
destroy g
nothing_left "$fds"
