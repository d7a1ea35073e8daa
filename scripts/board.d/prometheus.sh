# A disk with Prometheus and promtool for dom0, from Debian's binary packages: a root of its own.
# shellcheck shell=bash

prometheus_dir() { cached prometheus "$(key_of "$TOP/scripts/board.d/prometheus.sh")" build_prometheus prometheus.ext4; }
build_prometheus() {
    say "Making a disk with Prometheus"
    local dir=$1 root=$1/root
    debian_root trixie prometheus "$root" "$dir/mmdebstrap.log" || return 1
    as_root mkdir -p "$root"/{dev,proc,run,tmp,etc}
    # Where its programs look for their loader: a link that no package brings.
    as_root ln -s usr/lib "$root/lib"
    as_root rm -rf "$root"/usr/share "$root"/usr/lib/python3*
    as_root mke2fs -q -t ext4 -L prometheus -d "$root" "$dir/prometheus.ext4" 512M >"$dir/mke2fs.log" 2>&1 || die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root"
}
