# Measurements where dom0's processor is short: many guests, and a dom0 that is busy. Sourced by bash there, after dom0.sh.
# shellcheck shell=bash

# The lines that `measure` prints are scripts/board.d/crowd.py's.
DISKS_IN_TURN='xvda vda vdb'

# begin_crowd COUNT: starts guests g1, g2, …, each with a loop device of its own by xen-blkback, by grants and by frames.
begin_crowd() {
    local number
    CONSOLE_OF=() WORKERS=()
    write_pv_hotplug
    for ((number = 1; number <= $1; number++)); do
        make_disk "/tmp/disk$number.img" 16
        losetup "/dev/loop$((number - 1))" "/tmp/disk$number.img"
        shared "/dev/loop$((number - 1))"
    done | configure
    start_daemon
    for ((number = 1; number <= $1; number++)); do
        guest "g$number" orders "memory = 64" "$(three_disks "/dev/loop$((number - 1))")"
        create "g$number"
        said "g$number" '^guest: orders' >/dev/null
        CONSOLE_OF[number]=$(xenstore-read "/local/domain/$(domid "g$number")/console/tty")
        WORKERS+=("/proc/$(pids_of "$(domid "g$number")")/status")
    done
}

# end_crowd COUNT
end_crowd() {
    local number
    for ((number = 1; number <= $1; number++)); do
        is_well "g$number"
        destroy "g$number"
    done
    stop_daemon
}

# sample COUNT: what has been used and done so far: processor time in ms of dom0 and of the guests, a clock in ms, transfers of
# the guests' loop devices, changes of task in dom0, and of the workers those that they asked for and those that they did not.
sample() {
    local number loops=()
    for ((number = 1; number <= $1; number++)); do loops+=("/sys/block/loop$((number - 1))/stat"); done
    echo "$(xl list | awk 'NR == 2 { dom0 = $6 } NR > 2 { guests += $6 } END { print int(dom0 * 1000), int(guests * 1000) }')" \
        "$(awk '{ print int($1 * 1000) }' /proc/uptime)" \
        "$(awk '{ sum += $1 + $5 } END { print sum }' "${loops[@]}")" "$(awk '$1 == "ctxt" { print $2 }' /proc/stat)" \
        "$(awk '/^voluntary/ { own += $2 } /^nonvoluntary/ { forced += $2 } END { print own, forced }' "${WORKERS[@]}")"
}

# measure LOAD COUNT DISK PATTERN SECONDS [OTHER_PATTERN]: has guests g1 to gCOUNT transfer at the same time, g2 and so on by
# OTHER_PATTERN, and prints `crowd LOAD COUNT DISK PATTERN`, what that took, and what each guest says.
measure() {
    local load=$1 count=$2 disk=$3 pattern=$4 seconds=$5 other=${6:-$4} number before after said=() i
    [ "$disk" = xvda ] || counters >/tmp/counted
    for ((number = 1; number <= count; number++)); do said[number]=$(count_said "g$number" "^bench $disk "); done
    read -r -a before <<<"$(sample "$count")"
    for ((number = 1; number <= count; number++)); do
        echo "$disk $([ $number = 1 ] && echo "$pattern" || echo "$other") $seconds" >"${CONSOLE_OF[number]}"
    done
    # Nothing looks meanwhile: that would take dom0's processor from what is measured. They warm up for 0.2 s.
    sleep "$((seconds + 1))"
    for ((number = 1; number <= count; number++)); do
        wait_for 60 "g$number to have measured $disk" has_measured "$number" "$disk" "${said[number]}"
    done
    read -r -a after <<<"$(sample "$count")"
    echo "  crowd $load $count $disk $pattern${6:+/$6}$(for i in "${!before[@]}"; do echo -n " $((after[i] - before[i]))"; done)" \
        "$(for ((number = 1; number <= count; number++)); do console "g$number" | awk -v disk="$disk" '$1 == "bench" && $2 == disk { line = $4 (NF > 5 ? "/" $6 : "") } END { print line }'; done | tr '\n' ' ')"
    [ "$disk" = xvda ] || echo "  crowd-counts $load $count $disk $pattern${6:+/$6} $(counters | paste -d' ' /tmp/counted - | awk '{ print $1, $4 - $2 }' | tr '\n' ' ')"
}
# counters: what all devices and workers have counted, a line of `NAME VALUE` each.
counters() {
    xen-virtioctl list --json | awk -F'[":, ]+' '
        $2 ~ /^(requests|traps|kicks|interrupts|copy_batches|copy_segments|submissions|sleeps|yields|task_switches|syscalls|cpu_ns|polled_ns)$/ { sum[$2] += $3 }
        END { for (name in sum) print name, sum[name] }' | sort
}
has_measured() { [ "$(count_said "g$1" "^bench $2 ")" -gt "$3" ]; }

# 1, 4 and 8 guests at once; then one that waits for each request beside one that has 64 of them under way.
run_crowd() {
    local run disk count pattern
    begin_crowd 8
    say "up to 8 guests, each with a loop device of its own; dom0 has $(nproc) processor(s)"
    for ((run = 0; run < ${BENCH_RUNS:-5}; run++)); do
        for count in 1 4 8; do
            for pattern in 4k-qd4-randread 4k-qd16-randread; do
                for disk in $DISKS_IN_TURN; do measure quiet "$count" "$disk" "$pattern" 3; done
            done
        done
        for disk in $DISKS_IN_TURN; do measure quiet 2 "$disk" 4k-qd1-randread 3 4k-qd64-randread; done
    done
    end_crowd 8
}

# One guest, while dom0 does nothing else, while it computes, and while it starts one short program after the other.
run_busy() {
    local run disk load pattern busy
    begin_crowd 1
    say "one guest beside what else dom0 does; dom0 has $(nproc) processor(s)"
    for ((run = 0; run < ${BENCH_RUNS:-5}; run++)); do
        for load in quiet loop tasks; do
            $load &
            busy=$!
            for pattern in 4k-qd1-randread 4k-qd16-randread 4k-qd16-randwrite 64k-qd4-read; do
                for disk in $DISKS_IN_TURN; do measure $load 1 "$disk" "$pattern" 3; done
            done
            kill $busy 2>/dev/null
            wait $busy 2>/dev/null || true
        done
    done
    end_crowd 1
}
quiet() { :; }
loop() { while :; do :; done; }
tasks() { while :; do /bin/true; done; }
