# A driver by hand cuts frames and their headers in any pieces, posts buffers that are too small, takes no partial checksums, sets pairs that cannot be, and resets its device or runs out of buffers in a flood.
mount_net_tools
start_daemon
fds=$(daemon_fds)
ip tuntap add dev tap7 mode tap multi_queue
ip tuntap add dev tap8 mode tap
# Nobody but the peer sends anything.
for interface in tap7 tap8; do echo 1 >/proc/sys/net/ipv6/conf/$interface/disable_ipv6; done
ip link add br7 type bridge
echo 1 >/proc/sys/net/ipv6/conf/br7/disable_ipv6
for interface in tap7 tap8; do ip link set $interface master br7 up; done
ip link set br7 up
guest-io peer tap8 &
peer=$!
name=framing
guest $name net-framing "$(by_file $name <<'DEVICE'
[[device]]
type = 'net'
mac = '00:16:3e:00:00:07'
tap = 'tap7'
queues = 2
DEVICE
)"
create_by_file $name
said $name 'framing: refilled in a flood' 120 >/dev/null
console $name | grep -a '^framing: ' | sed 's/^/  /'
# What dom0's kernel completes for this driver.
said $name 'framing: partial checksums: [1-9]' >/dev/null
wait $peer || fail "the peer failed"
[ "$(report dropped_too_large)" = 2 ] || fail "$(report dropped_too_large) frames were counted as too large"
[ "$(report restarts)" = 0 ] || fail "$(report restarts) workers have died"
said $name 'guest: done' >/dev/null
destroy $name
ip link del br7
for interface in tap7 tap8; do ip link del $interface; done
nothing_left "$fds"
