# The vhost-device back-ends from the crate registry, unmodified, serve one guest: noise, an i2c bus, lines, a sensor, a SCSI disk, sound, keys.
mount_back_ends
start_daemon
fds=$(daemon_fds)
busybox insmod i2c-stub.ko chip_addr=0x50
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
sim=/sys/kernel/config/gpio-sim/lines
mkdir -p $sim/bank0
echo 4 >$sim/bank0/num_lines
for ((line = 0; line < 4; line++)); do mkdir $sim/bank0/line$line && echo line$line >$sim/bank0/line$line/name; done
echo 1 >$sim/live
chip=$(cat $sim/bank0/chip_name)
lines=/sys/devices/platform/$(cat $sim/dev_name)/$chip
pull() { echo "pull-$2" >"$lines/sim_gpio$1/pull"; }
has_value() { [ "$(cat "$lines/sim_gpio$1/value")" = "$2" ]; }
kinds=(rng i2c gpio scmi scsi sound input)
# A keyboard, whose key is pressed by a line.
mkfifo /tmp/keys
guest-io type </tmp/keys >/tmp/typed &
exec {keys}>/tmp/keys
wait_for 5 "a keyboard" grep -q 'is there' /tmp/typed
keyboard=$(grep -l 'a wheel!' /sys/class/input/event*/device/name)
keyboard=/dev/input/$(basename "${keyboard%/device/name}")
start_back_ends() {
    back_ends=()
    rm -f /run/peripheral.*
    start() { back_end "$1" "vhost-device-$1" "${@:2}" && back_ends+=($BACK_END); }
    start rng --socket-path /run/peripheral.rng --rng-source /dev/urandom
    start i2c --socket-path /run/peripheral.i2c --socket-count 1 --device-list "SMBus stub driver:80"
    start gpio --socket-path /run/peripheral.gpio --socket-count 1 --device-list "${chip#gpiochip}"
    start scmi --socket-path /run/peripheral.scmi --device fake,name=fake
    start scsi --socket-path /run/peripheral.scsi /tmp/scsi.img
    start sound --socket /run/peripheral.sound --backend null
    start input --socket-path /run/peripheral.input --event-list "$keyboard"
}
socket_of() {
    case $1 in
        # A socket for each guest that it could have.
        rng | i2c | gpio | input) echo "/run/peripheral.${1}0" ;;
        *) echo "/run/peripheral.$1" ;;
    esac
}
for grants in true false; do
    [ $grants = true ] || whole || continue
    make_disk /tmp/scsi.img 8
    start_back_ends
    for kind in "${kinds[@]}"; do wait_for 10 "vhost-device-$kind" is_socket "$(socket_of $kind)"; done
    guest $grants peripherals "$(by_file $grants <<<"$(for kind in "${kinds[@]}"; do
        printf "[[device]]\ntype = '%s'\nsocket = '%s'\ngrant-usage = %s\n" $kind "$(socket_of $kind)" $grants
    done)")"
    create_by_file $grants
    note "$(said $grants 'chi-square .* of 16384 bytes')"
    note "$(said $grants 'guest: bus [0-9]* has 50 $')"
    said $grants 'guest: byte 0xab' >/dev/null
    said $grants 'guest: word 0x1234' >/dev/null
    before=$(said $grants 'guest: 4 lines, line 1 is')
    wait_for 5 "line 0 to be high" has_value 0 1
    said $grants 'edges: waits' >/dev/null
    # Without anybody who has the line, a pull changes nothing.
    pull 1 up
    for edge in 1 2 3; do pull 2 up && sleep 0.2 && pull 2 down && sleep 0.2; done
    note "$(said $grants 'edges: 3 seen')"
    # vhost-device-gpio 0.1.0 tells what a line is the wrong way round.
    after=$(said $grants 'guest: line 1 is now')
    [ "${before##* }${after##* }" = 10 ] || fail "line 1, pulled up: $before, $after"
    pull 1 down
    wait_for 5 "line 0 to be low" has_value 0 0
    note "$(said $grants 'guest: sensor fake: ')"
    note "$(said $grants 'guest: scsi disk written')"
    [[ $(said $grants 'guest: scsi disk written') == *" $(md5sum </tmp/scsi.img | cut -d' ' -f1)" ]] || fail "the SCSI disk is another one in dom0"
    note "$(said $grants 'guest: sound card [0-9]')"
    said $grants 'guest: played' >/dev/null
    note "$(said $grants 'guest: opened and closed 20 times')"
    said $grants 'input: waits' >/dev/null
    for key in 1 2; do echo >&$keys; done
    note "$(said $grants 'guest: input .*')"
    [[ $(said $grants 'input: 6 seen') == *': 1:30:1 2:0:-3 1:30:0 1:30:1 2:0:-3 1:30:0' ]] || fail "other events than were made: $(said $grants 'input: 6 seen')"
    is_well $grants
    for ((index = 0; index < ${#kinds[@]}; index++)); do sees_only_ours "${back_ends[index]}"; done
    xen-virtioctl list
    destroy $grants
    kill "${back_ends[@]}" 2>/dev/null || true
done
exec {keys}>&-
echo 0 >$sim/live
rmdir $sim/bank0/line* $sim/bank0 $sim
busybox rmmod i2c-stub
nothing_left "$fds"
