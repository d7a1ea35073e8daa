# A guest that always asks for more costs dom0 no more than its share of a processor.
make_disk /tmp/disk.img 32
mkdir -p /etc/xen-virtiod
printf '[limits]\ncpu-percent = 20\n' >/etc/xen-virtiod/config.toml
start_daemon
guest g bench "disk = [ $(disk /tmp/disk.img) ]"
sed -i 's/GUEST=bench/& PATTERNS=4k-qd16-randread RUNS=1 SECS=8 DISKS=vda/' /tmp/g.cfg
create g
said g 'guest: bench' >/dev/null
worker=$(pids_of "$(domid g)")
# Ticks of 10 ms.
used() { awk '{ print $14 + $15 }' "/proc/$worker/stat"; }
sleep 1
before=$(used)
sleep 5
share=$((($(used) - before) / 5))
note "a worker that is always busy used $share % of a processor"
[ $share -ge 10 ] && [ $share -le 24 ] || fail "$share % instead of 20 %"
said g 'guest: done' >/dev/null
note "$(said g 'bench vda')"
destroy g
