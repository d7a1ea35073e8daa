# A back-end misbehaves in every manner: it costs its own device, which works again with a good one; the guest's other disk goes on.
# Long: the host test tests/stand-in has all manners too. MANNERS="ends-at-call …" has only those.
make_disk /tmp/own.img 32
make_disk /tmp/other.img 16
mount_back_ends
# Of sockets that take long to close, one manner has a loopback interface.
chroot /back-ends ip link set lo up
start_daemon
fds=$(daemon_fds)
socket=/run/hostile.sock
back_end_of() {
    rm -f $socket
    stand-in $socket /tmp/other.img "$1" &
    BACK_END=$!
}
end_back_end() {
    kill -KILL $BACK_END
    wait $BACK_END 2>/dev/null || true
}
reads_on() { [ "$(count_said g 'endures: reads')" -gt "$1" ]; }
back_end_of good
guest g hostile-back-end "$(by_file g <<<"[[device]]
type = 'blk'
socket = '$socket'
[[device]]
type = 'blk'
path = '/tmp/own.img'")" "vcpus = 2"
create_by_file g
wait_for 30 "the guest to read its disk" reads_on 0
# The board pauses too where processes begin and end that have nothing to do with the guest.
since=$(count_said g 'verifying:')
for ((i = 0; i < ${TIMES:-12}; i++)); do
    stand-in /run/nobodys.sock /tmp/other.img good &
    sleep 1.5
    kill -KILL $!
    wait $! 2>/dev/null || true
    rm -f /run/nobodys.sock
    sleep 1
done
alone=$(longest_pause g "$since")
usual=0 longest=0 tried=0
for manner in ${MANNERS:-$(stand-in manners)}; do
    end_back_end
    since=$(count_said g 'verifying:')
    back_end_of "$manner"
    sleep 1.5
    before=$(count_said g 'endures: reads')
    end_back_end
    back_end_of good
    wait_for 40 "the disk to be read again after a back-end that $manner" reads_on "$before"
    is_well g
    pause=$(longest_pause g "$since")
    [ "$manner" != good ] || usual=$pause
    [ "${pause:-0}" -lt 100 ] || note "$manner: the other disk has paused for $pause ms"
    [ "${pause:-0}" -le $longest ] || longest=$pause worst=$manner
    tried=$((tried + 1))
done
note "$tried manners; the other disk's longest pause: $longest ms ($worst), with a good one $usual ms, beside processes of nobody $alone ms"
[ $longest -lt 500 ] || fail "a back-end that $worst has held up another disk of its guest"
has_said g 'guest: FAIL|does not hold' && fail "guest g: $(console g | tail -n 5)"
kill -0 "$(pids_of "$(domid g)")" || fail "no worker"
grep -q 'is lost' $DAEMON_LOG && fail "a worker was lost: $(grep 'is lost' $DAEMON_LOG | head -n1)"
[ -n "${MANNERS:-}" ] || [ "$(count_said g 'endures: resets')" -ge 5 ] || fail "the driver was told to reset $(count_said g 'endures: resets') times only"
note "the driver: $(count_said g 'endures: reads') reads, told to reset $(count_said g 'endures: resets') times, waited $(count_said g 'endures: waits') times"
note "lines in the log: $(wc -l <$DAEMON_LOG)"
xen-virtioctl list
destroy g
end_back_end
nothing_left "$fds"
