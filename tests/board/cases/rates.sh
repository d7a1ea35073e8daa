# A disk and a network are held to their rates, within five percent over ten seconds.
# Long: takes a minute; the simulator's tests hold devices to rates too.
mount_net_tools
make_disk /tmp/disk.img 64
configure <<CONFIG
[[disk]]
path = "$NET_TOOLS"
shared = true
[[disk]]
path = "/tmp/disk.img"
requests-per-second = 300
bytes-per-second = 8000000
CONFIG
start_daemon
fds=$(daemon_fds)
ip tuntap add dev tap2 mode tap
bridge br2 10.9.2.2/24 tap2
guest r rates "$(by_file r <<DEVICES
[[device]]
type = 'blk'
path = '$NET_TOOLS'
read-only = true
[[device]]
type = 'blk'
path = '/tmp/disk.img'
[[device]]
type = 'net'
tap = 'tap2'
mac = '00:16:3e:00:00:02'
send-bytes-per-second = 3000000
receive-frames-per-second = 500
DEVICES
)"
# holds WHAT RATE EXPECTED: within five percent.
holds() {
    note "$1: $2, of $3"
    awk -v rate="$2" -v of="$3" 'BEGIN { exit !(rate > 0.95 * of && rate < 1.05 * of) }' || fail "$1: $2 and not $3"
}
create_by_file r
said r 'guest: ready' 60 >/dev/null
holds "requests a second" "$(said r 'bench.*4k-qd4-randread' | awk '{ print $3 }')" 300
holds "MB a second to the disk" "$(said r 'bench.*64k-qd4-write' | awk '{ print $4 }')" 8
# Beside what is sent, a frame has headers: 54 bytes in 1514, or what a segment of many has.
holds "MB a second from the guest" "$(iperf3 -c 10.9.2.1 -t 10 -u -b 100M -l 1400 -R -f k | awk '/receiver/ { print $7 / 8000 * 1442 / 1400 }')" 3
# What waits in the tap comes when iperf3 has ended: so by what the worker counts meanwhile.
iperf3 -c 10.9.2.1 -t 14 -u -b 20M -l 1400 >/dev/null &
flood=$!
sleep 2
before=$(report received_frames) began=$EPOCHREALTIME
sleep 10
after=$(report received_frames) ended=$EPOCHREALTIME
holds "frames a second to the guest" "$(awk -v n=$((after - before)) -v a="$began" -v b="$ended" 'BEGIN { print n / (b - a) }')" 500
wait $flood
is_well r
destroy r
ip link del br2
ip link del tap2
nothing_left "$fds"
stop_daemon
rm -f /etc/xen-virtiod/config.toml
