# A disk with iperf3, iproute2, ethtool, socat and tmux for dom0 and its guests, from Debian's binary packages: a root of its own, with
# an init for a guest that boots from it.
# shellcheck shell=bash

net_tools_dir() { cached net-tools "$(key_of "$TOP/scripts/board.d/net_tools.sh")" build_net_tools net-tools.ext4; }
build_net_tools() {
    say "Making a disk with iperf3, iproute2, ethtool, socat and tmux"
    local dir=$1 root=$1/root
    debian_root trixie iperf3,iproute2,ethtool,socat,tmux,ncurses-base,libc-bin,busybox-static,bash "$root" "$dir/mmdebstrap.log" || return 1
    as_root mkdir -p "$root"/{dev,proc,sys,run,tmp,root,mnt}
    # Where its programs look for their loader, and shell scripts for their shell: links that no package brings.
    as_root ln -s usr/lib "$root/lib"
    as_root ln -s usr/bin "$root/bin"
    as_root ln -sf bash "$root/usr/bin/sh"
    as_root rm -rf "$root"/usr/share/{doc,man,locale} "$root"/usr/lib/python3*
    as_root mke2fs -q -t ext4 -L net-tools -d "$root" "$dir/net-tools.ext4" 384M >"$dir/mke2fs.log" 2>&1 ||
        die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root"
}
