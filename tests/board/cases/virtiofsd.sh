# virtiofsd, unmodified, shares a folder with a guest: a tree, a large file; the service keeps it running; it, the worker and the service die.
mount_back_ends
start_daemon
fds=$(daemon_fds)
socket=/run/fs.sock
# It removes its socket's name as soon as somebody has connected.
virtiofsd() {
    back_end virtiofsd /usr/libexec/virtiofsd --socket-path $socket --shared-dir /run/share --sandbox none --xattr --log-level warn
}
# fs_guest NAME GRANTS [KERNEL_OPTIONS [SETTINGS [XL_LINE]]]
fs_guest() {
    guest "$1" fs "$(by_file "$1" <<<"[[device]]
type = 'fs'
socket = '$socket'
tag = 'share'
grant-usage = $2
${4:-}")" ${5:+"$5"}
    sed -i "s/GUEST=fs/& FILES=$files MIB=$mib ${3:-}/" "/tmp/$1.cfg"
    create_by_file "$1"
}
tree() { (cd /run/share/tree && find . -type f | sort | xargs cat | md5sum | cut -d' ' -f1); }
# agrees NAME: what the guest sees is what dom0 sees.
agrees() {
    local large tree
    large=$(said "$1" 'guest: large' 240) tree=$(said "$1" 'guest: tree' 60)
    note "$large; $tree"
    [ "${large##* }" = "$(md5sum </run/share/large | cut -d' ' -f1)" ] || fail "the large file is another one in dom0"
    [ "${tree##* }" = "$(tree)" ] || fail "the tree is another one in dom0"
    [[ $large == *" $((mib << 20)) bytes "* && $tree == *" $((20 * files - 1)) files "* ]] || fail "not all of it is there"
}
for grants in true false; do
    [ $grants = true ] || whole || continue
    # All of it by grants; by frames, what shows that it works so too.
    if [ $grants = false ]; then files=5 mib=8; elif whole; then files=100 mib=64; else files=10 mib=16; fi
    rm -rf /run/share && mkdir /run/share
    virtiofsd
    wait_for 20 "virtiofsd" is_socket $socket
    fs_guest $grants $grants
    agrees $grants
    [ -f /run/share/tree/1/renamed ] && [ -d /run/share/tree/two ] && [ ! -e /run/share/tree/0/1 ] && [ -L /run/share/link ] ||
        fail "what the guest has renamed, removed and linked is not so in dom0"
    note "$(guest-io xattr /run/share/large user.colour)"
    xen-virtioctl list
    destroy $grants
    # It ends when its peer goes.
    wait $BACK_END 2>/dev/null || true
    rm -f $socket
done
# Kept running by the service, as a user of its own. With the libraries of its own root.
socket=/run/sockets/fs.sock libraries=/back-ends/usr/lib/aarch64-linux-gnu
rm -rf /run/share && mkdir /run/share && chown 1000:1000 /run/share
files=5 mib=8
fs_guest kept true GO_ON=yes "user = '1000'
exec = ['/bin/sh', '-c', '[ ! -e /tmp/slow ] || sleep 3; exec \$0 \$@', '$libraries/ld-linux-aarch64.so.1', '--library-path',
    '$libraries', '/back-ends/usr/libexec/virtiofsd', '--socket-path={socket}', '--shared-dir=/run/share', '--xattr',
    '--log-level=warn']
" "on_reboot = 'restart'"
program() { pgrep -U 1000 | head -n 1; }
# goes_on WHAT: the guest uses the folder on, which it may have to mount anew.
goes_on() {
    local before
    before=$(count_said kept 'guest: counts')
    counts_on() { [ "$(count_said kept 'guest: counts')" -gt $((before + 3)) ]; }
    wait_for 30 "the guest to go on after $1" counts_on
    note "$1: $(count_said kept 'guest: fails') failure(s) seen by the guest so far"
}
said kept 'guest: counts 3' >/dev/null
keeper() { pgrep -f '^xen-virtiod back-end /run'; }
first=$(keeper)
# The service's end and its worker's it does not notice: the next worker has the same connection, and the guest the same mount.
unnoticed() {
    goes_on "$1"
    [ "$(count_said kept 'guest: fails')" = "$fails" ] || fail "the guest has noticed $1"
    [ "$(program)" = "$served" ] || fail "virtiofsd has ended with $1"
}
fails=$(count_said kept 'guest: fails') served=$(program)
kill -KILL $DAEMON && restart_daemon
unnoticed "the service's death"
[ "$(keeper)" = "$first" ] || fail "the program's keeper has not outlived the service: $first, $(keeper)"
if whole; then
    kill $DAEMON && restart_daemon
    unnoticed "the service's end"
    kill -KILL "$(program)"
    goes_on "virtiofsd's death"
    grep -q 'kept.*virtio_file/0: .* has ended .*; it is started again' $DAEMON_LOG || fail "the log does not say that the program has ended"
    fails=$(count_said kept 'guest: fails') served=$(program)
fi
kill -KILL "$(pids_of "$(domid kept)")"
unnoticed "the worker's death"
# xl restarts the guest without waiting, and its back-end, which ends with it, takes its time.
touch /tmp/slow /run/share/reboot
said kept 'guest: reboots' >/dev/null
is_second() { [ "$(count_said kept 'guest: fs on Linux')" = 2 ]; }
wait_for 30 "the guest to come again" is_second
goes_on "a reboot"
rm /tmp/slow
is_well kept
destroy kept
no_program() { [ -z "$(program)$(keeper)" ]; }
wait_for 10 "the program to end with its guest" no_program
rm -rf /run/share
nothing_left "$(daemon_fds)"
