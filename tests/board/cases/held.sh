# A guest of a file, which xl lets run at once, is paused until its device is served: its image comes late, the service dies meanwhile, xl reboots it.
start_daemon
fds=$(daemon_fds)
make_disk /tmp/late.img 32
mv /tmp/late.img /tmp/hidden.img
guest g reboot "$(by_file g <<<$'[[device]]\ntype = "blk"\npath = "/tmp/late.img"')" "on_reboot = 'restart'"
command xl create -q /tmp/g.cfg
wait_for 10 "its disk to be refused" grep -q '/tmp/late.img' $DAEMON_LOG
is_paused() { [[ $(command xl list g | awk 'NR == 2 { print $5 }') == *p* ]]; }
# stays_paused WHEN
stays_paused() {
    sleep 2
    is_paused || fail "it runs $1"
    ! has_said g guest: || fail "it has run $1"
    xen-virtioctl list | grep -q "g (.*): it is paused until its devices are served" || fail "list does not say that it is paused $1"
}
stays_paused "without its disk"
kill -KILL $DAEMON && restart_daemon
stays_paused "after the service's death"
mv /tmp/hidden.img /tmp/late.img
said g 'left its mark' >/dev/null
! is_paused || fail "it is paused and runs"
first=$(domid g)
command xl reboot g
said g 'second boot finds I was here' >/dev/null
said g 'verified:' >/dev/null
note "paused from domain $first's start to its disk's, and rebooted to $(domid g) by grants"
destroy g
nothing_left "$fds"
