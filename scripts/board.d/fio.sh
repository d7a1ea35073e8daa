# A disk with fio for a guest, from Debian's binary packages: some of its libraries come with it.
# shellcheck shell=bash

fio_dir() { cached fio "$(key_of "$TOP/scripts/board.d/fio.sh")" build_fio fio.ext4; }
build_fio() {
    say "Making a disk with fio"
    local dir=$1 root=$1/root
    debian_root trixie fio "$root" "$dir/mmdebstrap.log" || return 1
    as_root mkdir -p "$root"/{dev,proc,tmp}
    # Where its programs look for their loader: a link that no package brings.
    as_root ln -s usr/lib "$root/lib"
    as_root rm -rf "$root"/usr/share/{doc,man,locale} "$root"/usr/lib/python3*
    as_root mke2fs -q -t ext4 -L fio -d "$root" "$dir/fio.ext4" 384M >"$dir/mke2fs.log" 2>&1 || die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root"
}
