# The vhost-device back-ends from the crate registry, unmodified, serve what a guest's own drivers use.
mount_back_ends
start_daemon
fds=$(daemon_fds)
for grants in true false; do
    back_end rng vhost-device-rng --socket-path /run/rng.sock --rng-source /dev/urandom
    wait_for 10 "vhost-device-rng" is_socket /run/rng.sock0
    guest g rng "$(by_file g <<<"[[device]]
type = 'rng'
socket = '/run/rng.sock0'
grant-usage = $grants")"
    sed -i 's/GUEST=rng/& BYTES=65536/' /tmp/g.cfg
    create_by_file g
    said g 'guest: source virtio_rng' >/dev/null
    said g "guest: chi-square .* of 65536 bytes" 90
    xen-virtioctl list
    destroy g
    kill $BACK_END || true
    rm -f /run/rng.sock*
done
nothing_left "$fds"
