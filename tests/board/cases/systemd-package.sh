# Our Debian package in a dom0 with systemd: it starts guests with the host, and is restarted, killed, upgraded and removed under them, while they verify their disks, one of them behind a back-end, and answer from a bridge.
# Long: boots dom0 twice, and its image takes ten minutes and more to build.
# Dom0: Debian

guests=(a b c)

# line PATH VDEV: a disk for xl, which grants where this xl has a word for that.
line() {
    local grants='grant_usage=1, '
    [ "$XEN_VERSION" != 4.17 ] || grants=
    echo "'backendtype=standalone, specification=virtio, ${grants}vdev=$2, access=rw, target=$1'"
}
# our_guest NAME [XL_LINE...]: /etc/xen/NAME.cfg, of one that verifies /dev/vda and /dev/vdb until it is destroyed.
our_guest() {
    local name=$1
    shift
    guest "$name" verify "extra = 'console=hvc0 quiet GUEST=verify SECS=100000'" "$@"
    sed 's|/payload/|/srv/|' "/tmp/$name.cfg" >"/etc/xen/$name.cfg"
}
# go_on WHY: all guests verify on; none has seen an error.
go_on() {
    local name pauses=
    for name in "${guests[@]}"; do
        verifies_on "$name"
        pauses+=" $name $(longest_pause "$name")"
    done
    [ "$(report request_errors)" = 0 ] || fail "$1: $(report request_errors) failed requests"
    note "$1: all verify on; longest pauses in ms:$pauses"
}
# Guest e's disk behind a back-end, and its interface, which is made and given to a bridge by xl's own script.
guest_e() {
    # What Debian's minimal root has of both.
    ln -s /usr/bin/busybox /usr/local/sbin/ip
    ln -s /usr/bin/busybox /usr/local/sbin/brctl
    unset -f ip
    ip link add br0 type bridge
    ip addr add 10.9.0.2/24 dev br0
    ip link set br0 up
    mount_back_ends
    make_disk /tmp/e0.img 16
    make_disk /srv/e1.img 16
    back_end storage qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=/tmp/e0.img \
        --export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=/run/storage.sock,writable=on
    wait_for 60 "qemu-storage-daemon" is_socket /run/storage.sock
    guest e verify "$(by_file e <<'DEVICES'
[[device]]
type = 'blk'
socket = '/run/storage.sock'
[[device]]
type = 'blk'
path = '/srv/e1.img'
[[device]]
type = 'net'
bridge = 'br0'
mac = '00:16:3e:00:00:07'
DEVICES
)"
    sed -i 's/GUEST=verify/& SECS=100000 ADDRESS=10.9.0.1\/24/' /tmp/e.cfg
    xen-virtioctl create /tmp/e.cfg >/tmp/create.log 2>&1 || fail "$(cat /tmp/create.log)"
    verifies_on e 120
    answers_e
    CONNECTION=$(connection)
    guests+=(e)
}
answers_e() { wait_for 20 "guest e to answer from the bridge" busybox ping -c 1 -W 1 10.9.0.1 >/dev/null; }
# connection: that of guest e's worker and its back-end, which the service notes when the back-end has what comes with it.
connection() { grep -ho '"connection":[0-9]*' /run/xen-virtiod/shared/"$(domid e)"-*; }
# kept WHY: guest e's back-end has the connection still that it has had.
kept() { wait_for 20 "$1: guest e's back-end to have the connection $CONNECTION, and not $(connection)" has_connection; }
has_connection() { [ "$(connection)" = "$CONNECTION" ]; }
no_interface() { ! ls /sys/class/net | grep -q '^vio'; }
install() { apt-get install --yes --no-install-recommends --allow-downgrades "$1" >/tmp/apt.log 2>&1 || fail "$(tail -n 5 /tmp/apt.log)"; }
version() { dpkg-query -W -f='${Version}' xen-virtio; }
# doctor: its findings but what this Xen and its xl lack.
doctor() { xen-virtioctl doctor | grep -E '^(fault|warning): ' | grep -vE '^warning: (xen-fixes|xl): '; }

case $BOOT in
    1)
        install ./packages/earlier/xen-virtio.deb
        is_active $UNIT || fail "the unit has not started: $(systemctl status --no-pager $UNIT || true)"
        note "installed $(version), $(systemctl is-enabled $UNIT); $(grep . /run/board-state)"
        xen-virtioctl doctor | sed 's/^/  | /'
        [ -z "$(doctor)" ] || fail "doctor: $(doctor)"
        for unit in $UNIT xen-virtio-network.service; do
            rating=$(systemd-analyze security --no-pager $unit | awk '/Overall exposure/ { print $(NF - 2) }')
            note "systemd-analyze security $unit: $rating"
            awk -v rating="$rating" 'BEGIN { exit !(rating > 0 && rating <= 3.0) }' || fail "$unit is rated $rating"
        done
        [ -s /usr/share/man/man8/xen-virtiod.8.gz ] || fail "there is no manual page"
        mkdir -p /etc/xen/auto
        cp /payload/Image /payload/guest.cpio.gz /srv/
        for disk in a0 a1 b0 b1 c0 c1; do make_disk /srv/$disk.img 16; done
        for name in a b; do
            our_guest $name "disk = [ $(line /srv/${name}0.img xvda), $(line /srv/${name}1.img xvdb) ]"
            ln -s ../$name.cfg /etc/xen/auto/$name.cfg
        done
        if [ "$XEN_VERSION" = 4.17 ]; then
            lines=$(printf "[[device]]\ntype = 'blk'\npath = '/srv/c%d.img'\n" 0 1 | by_file c)
        else
            lines="xen_virtio = [ 'blk, path=/srv/c0.img', 'blk, path=/srv/c1.img' ]"
        fi
        our_guest c "${lines//\/tmp\//\/srv\/}"
        cp /tmp/c.dtb /srv/ 2>/dev/null || [ "$XEN_VERSION" != 4.17 ]
        systemctl --quiet enable xen-virtio-guest@c
        reboot_dom0
        ;;
    2)
        for unit in $UNIT xendomains.service xen-virtio-guest@c.service; do
            is_active $unit || fail "$unit has not started: $(systemctl status --no-pager $unit)"
        done
        ready=$(systemctl show --property ActiveEnterTimestampMonotonic --value $UNIT)
        for unit in xendomains.service xen-virtio-guest@c.service; do
            [ "$(systemctl show --property InactiveExitTimestampMonotonic --value $unit)" -ge "$ready" ] || fail "$unit began before the service was ready"
        done
        [ -z "$(doctor)" ] || fail "doctor: $(doctor)"
        go_on "after the host's start"

        [ -n "$(journal XEN_GUEST=a XEN_DEVICE=virtio_disk/51712 XEN_DOMID="$(domid a)")" ] || fail "the journal has no fields: $(journal -o json | tail -n 1)"
        note "$(journal XEN_GUEST=a XEN_DEVICE=virtio_disk/51712 | head -n 1)"

        guest_e
        systemctl restart $UNIT
        go_on "systemctl restart"
        kept "systemctl restart"
        note "systemd keeps $(systemctl show --property NFileDescriptorStore --value $UNIT) descriptors"

        # What opens interfaces ends, and then a worker that has one.
        name=e worker=$(pids_of "$(domid e)")
        systemctl kill --signal=KILL xen-virtio-network.service
        kill -KILL "$worker"
        wait_for 10 "another worker" has_worker
        go_on "a worker was killed, and what opens interfaces before"
        answers_e
        kept "a worker was killed"

        name=a worker=$(pids_of "$(domid a)") others=$(pids_of "$(domid b)")
        echo 1000 >"/proc/$worker/oom_score_adj"
        echo f >/proc/sysrq-trigger
        wait_for 10 "another worker after the out-of-memory killer" has_worker
        dmesg | grep -q "Out of memory: Killed process $worker " || fail "the worker was not killed for memory"
        [ "$(pids_of "$(domid b)")" = "$others" ] || fail "another guest's worker has ended with it"
        go_on "a worker was killed for memory"

        mkdir -p /run/systemd/system/$UNIT.d
        printf '[Service]\nWatchdogSec=4\n' >/run/systemd/system/$UNIT.d/watchdog.conf
        systemctl daemon-reload
        systemctl restart $UNIT
        sleep 6
        main=$(main_pid)
        [ "$(systemctl show --property NRestarts --value $UNIT)" = 0 ] || fail "the watchdog has ended a service that goes on"
        kill -STOP "$main"
        wait_for 60 "the watchdog to replace a service that stands still" has_another_main "$main"
        go_on "the watchdog"
        kept "the watchdog"

        # In the place of xl create, also for a guest that has nothing to wait for.
        guest d idle
        xen-virtioctl create /tmp/d.cfg >/tmp/create.log 2>&1 || fail "$(cat /tmp/create.log)"
        command xl destroy d

        main=$(main_pid)
        systemctl kill --kill-whom=all --signal=KILL $UNIT
        wait_for 60 "the service to be back" has_another_main "$main"
        go_on "systemctl kill of all"
        kept "systemctl kill of all"

        earlier=$(version) main=$(main_pid)
        install ./packages/xen-virtio.deb
        [ "$(version)" != "$earlier" ] || fail "the package was not upgraded"
        has_another_main "$main" || fail "the service was not restarted"
        go_on "upgraded from $earlier to $(version)"
        [ -n "${EARLIER_PACKAGE:-}" ] || kept "the upgrade"

        # Another service beside the unit's ends, and says why.
        if xen-virtiod >/tmp/second.log 2>&1; then fail "a second service runs"; fi
        note "a second service: $(tail -n 1 /tmp/second.log)"
        # In this order: a unit that is masked while it runs has lost its KillMode, and systemd ends the workers too.
        systemctl stop $UNIT
        systemctl --quiet mask $UNIT
        doctor | grep -q 'its unit is masked' || fail "doctor does not see that the unit is masked: $(doctor)"
        for name in "${guests[@]}"; do verifies_on "$name"; done
        systemctl --quiet unmask $UNIT
        systemctl start $UNIT
        [ -z "$(doctor)" ] || fail "doctor: $(doctor)"
        go_on "masked, and started again"

        apt-get remove --yes xen-virtio >/tmp/apt.log 2>&1 || fail "$(tail -n 5 /tmp/apt.log)"
        if is_active $UNIT; then fail "the service runs on without its package"; fi
        [ ! -e /usr/sbin/xen-virtiod ] || fail "its programs are left"
        for name in "${guests[@]}"; do verifies_on "$name"; done
        note "removed: its workers serve on"
        install ./packages/xen-virtio.deb
        go_on "installed again"
        answers_e

        for name in "${guests[@]}"; do destroy "$name"; done
        wait_for 10 "the workers to end" no_worker
        wait_for 20 "guest e's interface to be removed" no_interface
        [ "$(systemctl show --property NFileDescriptorStore --value $UNIT)" = 0 ] || fail "systemd keeps descriptors of guests that are gone"
        apt-get purge --yes xen-virtio >/tmp/apt.log 2>&1 || fail "$(tail -n 5 /tmp/apt.log)"
        left=$(find /usr /etc /lib/systemd /var/lib/systemd -name '*xen-virtio*' -not -path '*/guests*' | grep -v '^/etc/xen-virtiod$' | grep -v xen-virtio-guest@c | xargs)
        [ -z "$left" ] || fail "the package leaves $left"
        ;;
esac
