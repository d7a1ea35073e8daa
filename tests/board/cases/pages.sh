# The commands of README and docs that tests/board/commands has this case run, in its order, about a guest with a device of most kinds.
# Long: that each of our commands is understood as the pages write it, the tests of xen-virtioctl show.
mount_net_tools
socat() { chroot /net-tools /usr/bin/socat "$@"; }
# finds_at_most_warnings COMMAND...: of doctor, which knows what this Xen and its xl lack.
finds_at_most_warnings() {
    local status=0
    "$@" || status=$?
    [ $status = 0 ] || [ $status = 3 ]
}
start_daemon
make_disk /tmp/g1.img 16
make_disk /tmp/data.img 16
: >/tmp/config.toml
# The devices by their numbers: 0 a disk, 1 a console, 2 a keyboard, 3 a pointer, 4 a network, 5 sockets, 6 a place for another one.
devices=$(by_file g1 <<'TOML'
[[device]]
type = "blk"
path = "/tmp/g1.img"
[[device]]
type = "console"
ports = [{ name = "org.example.other" }, { name = "org.example.agent" }]
[[device]]
type = "input"
model = "keyboard"
[[device]]
type = "input"
model = "pointer"
[[device]]
type = "net"
tap = "vif-g1"
mac = "00:16:3e:00:00:01"
[[device]]
type = "vsock"
cid = 42
listen = "/run/g1.vsock"
[[device]]
type = "empty"
TOML
)
guest g1 idle "$devices" "extra = 'console=hvc0 quiet GUEST=idle'"
count=0
# What is run may read what it likes, but not this list.
while read -r line <&3; do
    case $line in
        'pages: '*) command=${line#pages: } command=${command##* => } ;;
        *) continue ;;
    esac
    (eval "$command") </dev/null >/tmp/out 2>&1 || fail "$command: $(tail -n 3 /tmp/out)"
    count=$((count + 1))
done 3<commands
note "$count commands"
[ -s /tmp/g1.html ] || fail "report has written no page"
xen-virtioctl list
destroy g1
ip link del vif-g1
