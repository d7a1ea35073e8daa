# A guest of virtio alone suspends, as far as all its devices and back, in the middle of a stream; whoever is connected to its sockets then is told.
# Long: rebind shows resets, virtio-alone the stream and the sockets.
. ./alone.sh
alone_begin
for grants in true false; do
    [ $grants = true ] || whole || continue
    name=s$grants
    alone_guest $name $grants alone
    suspends $name "$(whole && echo 10 || echo 1)"
    streams "after it"
    xen-virtioctl list
    is_well $name
    destroy $name
done
alone_end
