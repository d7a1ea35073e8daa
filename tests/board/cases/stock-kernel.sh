# Long: Debian's own kernel, which cannot grant and has virtio's drivers as modules, in a guest of virtio alone: streams both ways, its worker dies, it suspends.
. ./alone.sh
has_debian_kernel
alone_begin
name=stock
# As docs/performance.md says of guests that cannot grant.
alone_guest $name false debian "memory = 320" "extra = 'console=hvc0 quiet swiotlb=4096,force GUEST=debian'" "kernel = '/payload/debian/vmlinuz'" "ramdisk = '/payload/debian/guest.cpio.gz'"
note "modules: $(in_guest 'cut -d " " -f 1 /proc/modules' | sort | xargs)"
pings
streams "Debian's kernel"
worker=$(pids_of "$(domid $name)")
kill -KILL "$worker"
wait_for 10 "the next worker" has_worker
wait_for 20 "the guest to answer again" answers
suspends $name "$(whole && echo 5 || echo 1)"
xen-virtioctl list
is_well $name
destroy $name
alone_end
