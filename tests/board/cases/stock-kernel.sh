# Long: Debian's own kernel, which cannot grant and has virtio's drivers as modules, in a guest of virtio alone: streams both ways, its worker dies, it suspends.
. ./alone.sh
has_debian_kernel
alone_begin
name=stock
# As docs/performance.md says of guests that cannot grant.
alone_guest $name false debian "memory = 320" "extra = 'console=hvc0 quiet swiotlb=4096,force GUEST=debian'" "kernel = '/payload/debian/vmlinuz'" "ramdisk = '/payload/debian/guest.cpio.gz'"
modules=$(in_guest 'cut -d " " -f 1 /proc/modules' | sort | xargs)
note "modules: $modules"
for module in virtio_blk virtio_net virtio_rng vmw_vsock_virtio_transport; do
    [[ " $modules " == *" $module "* ]] || fail "$module is no module"
done
pings
streams "Debian's kernel"
in_guest 'ethtool -K eth0 tx off rx off tso off gso off gro off rx-gro-hw off 2>&1' >/dev/null
streams "Debian's kernel, offloads off"
worker=$(pids_of "$(domid $name)")
kill -KILL "$worker"
wait_for 10 "the next worker" has_worker
wait_for 20 "the guest to answer again" answers
suspends $name "$(whole && echo 5 || echo 1)"
xen-virtioctl list
is_well $name
destroy $name
alone_end
