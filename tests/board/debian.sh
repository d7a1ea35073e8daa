# What cases do in a dom0 of Debian's, which boots as often as they say. Sourced by bash there, after dom0.sh.
# shellcheck shell=bash
UNIT='xen-virtiod.service'
# How often dom0 has booted in this case.
BOOTS=/var/lib/board-boots
# What makes dom0 boot again, as a case's exit status.
AGAIN=75

# reboot_dom0: the case goes on in the next boot.
reboot_dom0() { exit $AGAIN; }

# run_across_boots CASE: what CASE does has the number of the boot, BOOT.
run_across_boots() {
    local status outcome
    xen=(/usr/lib/xen-*/bin)
    export PATH=$PATH:${xen[0]}
    BOOT=$(($(cat $BOOTS 2>/dev/null || echo 0) + 1))
    echo $BOOT >$BOOTS
    while sleep 5; do echo BOARD-ALIVE; done &
    systemctl is-system-running --wait >/run/board-state
    echo "BOARD-UP $(xl info | awk '/^xen_version/ { print "Xen " $3 }'), Linux $(uname -r), systemd $(systemctl --version | awk 'NR == 1 { print $2 }')"
    [ $BOOT != 1 ] || echo "CASE-BEGIN $1"
    run_case "$1"
    status=$?
    sync
    if [ $status = $AGAIN ]; then
        systemctl reboot
        return
    fi
    case $status in
        0) outcome=ok ;;
        77) outcome=skipped ;;
        *) outcome=FAILED ;;
    esac
    echo "CASE-END $1 $outcome $SECONDS"
    echo "BOARD-EXIT $((status != 0 && status != 77))"
    systemctl poweroff
}

# What the service has logged in this boot.
journal() { journalctl --boot --unit $UNIT --output cat --quiet "$@"; }
is_active() { systemctl is-active --quiet "$1"; }
main_pid() { systemctl show --property MainPID --value $UNIT; }
# has_another_main PID
has_another_main() { local now; now=$(main_pid) && [ "$now" != 0 ] && [ "$now" != "$1" ] && is_active $UNIT; }
