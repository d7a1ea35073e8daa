# virtiofsd, unmodified, shares a folder with a guest: a tree, a large file, a reboot, and a death.
mount_back_ends
start_daemon
fds=$(daemon_fds)
socket=/run/fs.sock
virtiofsd() {
    back_end virtiofsd /usr/libexec/virtiofsd --socket-path $socket --shared-dir /run/share --sandbox none --xattr --log-level warn
    wait_for 20 "virtiofsd" is_socket $socket
}
# fs_guest NAME GRANTS KERNEL_OPTIONS
fs_guest() {
    guest "$1" fs "$(by_file "$1" <<<"[[device]]
type = 'fs'
socket = '$socket'
tag = 'share'
grant-usage = $2")"
    sed -i "s/GUEST=fs/& FILES=$files MIB=$mib $3/" "/tmp/$1.cfg"
    create_by_file "$1"
}
tree() { (cd /run/share/tree && find . -type f | sort | xargs cat | md5sum | cut -d' ' -f1); }
# agrees NAME: what the guest sees is what dom0 sees.
agrees() {
    local large tree
    large=$(said "$1" 'guest: large' 120) tree=$(said "$1" 'guest: tree' 60)
    note "$large; $tree"
    [ "${large##* }" = "$(md5sum </run/share/large | cut -d' ' -f1)" ] || fail "the large file is another one in dom0"
    [ "${tree##* }" = "$(tree)" ] || fail "the tree is another one in dom0"
    [[ $large == *" $((mib << 20)) bytes "* && $tree == *" $((20 * files - 1)) files "* ]] || fail "not all of it is there"
}
for grants in true false; do
    # All of it with TIMES=1 and grants; without, what shows that it works so too.
    [ $grants = true ] && files=$([ -n "$TIMES" ] && echo 100 || echo 25) mib=64 || files=5 mib=8
    rm -rf /run/share && mkdir /run/share
    virtiofsd
    go_on=no
    [ $grants = true ] || go_on=yes
    fs_guest $grants $grants GO_ON=$go_on
    agrees $grants
    [ -f /run/share/tree/1/renamed ] && [ -d /run/share/tree/two ] && [ ! -e /run/share/tree/0/1 ] && [ -L /run/share/link ] ||
        fail "what the guest has renamed, removed and linked is not so in dom0"
    note "$(guest-io xattr /run/share/large user.colour)"
    xen-virtioctl list
    [ $grants = true ] || continue
    destroy $grants
    # It ends when its peer goes.
    wait $BACK_END 2>/dev/null || true
    rm -f $socket
done
said false 'guest: counts 3' >/dev/null
kill -KILL $BACK_END
rm -f $socket
sleep 2
virtiofsd
before=$(count_said false 'guest: counts')
counts_on() { [ "$(count_said false 'guest: counts')" -gt $((before + 3)) ]; }
wait_for 30 "the guest to go on with the folder" counts_on
note "virtiofsd killed: $(count_said false 'guest: fails') failure(s) seen by the guest, which mounts anew"
is_well false
destroy false
rm -rf /run/share $socket
nothing_left "$fds"
