# A disk that is a directory, missing, or not readable is refused in one clear line; other guests go on.
start_daemon
fds=$(daemon_fds)
for disk in 1 2; do make_disk /tmp/good$disk.img 32; done
guest good verify "disk = [ $(disk /tmp/good1.img), $(disk /tmp/good2.img 1 xvdb) ]" "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'"
create good
said good 'verifying:' >/dev/null

# checked NAME PATH: one line names the path before anything is created.
checked() {
    guest "$1" idle "disk = [ $(disk "$2") ]"
    xen-virtioctl check "/tmp/$1.cfg" >"/tmp/$1.check" 2>&1 && fail "xen-virtioctl check passes $2"
    [ "$(grep -cF "$2" "/tmp/$1.check")" = 1 ] || fail "xen-virtioctl check: $(cat "/tmp/$1.check")"
    note "$(cat "/tmp/$1.check")"
}
# refused NAME PATH: xl create fails too.
refused() {
    checked "$@"
    if xl create -q "/tmp/$1.cfg" >"/tmp/$1.out" 2>&1; then fail "a guest with the disk $2 was created"; fi
    wait_for 20 "guest $1 to be gone" is_gone "$1"
}
mkdir /tmp/a-directory
checked directory /tmp/a-directory
checked missing /tmp/no-such.img
: >/tmp/empty.img
if whole; then
    refused empty /tmp/empty.img
    grep -q 'disk /tmp/empty.img: .*less than a sector' $DAEMON_LOG || fail "the log does not say what is wrong with /tmp/empty.img"
else
    checked empty /tmp/empty.img
fi
# A device that cannot be opened, even by root: there is no driver for it.
mknod /tmp/no-driver b 240 7
if whole; then
    refused unreadable /tmp/no-driver
    grep -q 'disk /tmp/no-driver: cannot be opened' $DAEMON_LOG || fail "the log does not say what is wrong with /tmp/no-driver"
else
    checked unreadable /tmp/no-driver
fi
grep -a 'ERROR' $DAEMON_LOG | while read -r line; do note "$line"; done
verifies_on good
destroy good
nothing_left "$fds"
