# Unmodified vhost-user back-ends, from Debian's binary packages and the crate registry: a disk that dom0 mounts as
# /back-ends, a root of its own, whichever Debian dom0 is.
# shellcheck shell=bash

BACK_ENDS_SUITE=trixie
BACK_END_PACKAGES=virtiofsd,qemu-utils,passt,iproute2,libgpiod-dev
# Name and version on the crate registry, and what else cargo is told.
BACK_END_CRATES=(vhost-device-rng@0.1.0 vhost-device-vsock@0.3.0 'vhost-device-sound@0.3.0 --no-default-features'
    vhost-device-i2c@0.1.0 vhost-device-gpio@0.1.0 vhost-device-scmi@0.4.0 vhost-device-scsi@0.1.0
    vhost-device-input@0.1.0)

back_ends_dir() {
    cached back-ends "$(key_of "$TOP/scripts/board.d/back_ends.sh")" build_back_ends back-ends.ext4
}
build_back_ends() {
    say "Making a disk with virtiofsd, qemu-storage-daemon, passt and the vhost-device back-ends (about five minutes)"
    local dir=$1 root=$1/root crate
    debian_root $BACK_ENDS_SUITE $BACK_END_PACKAGES "$root" "$dir/mmdebstrap.log" || return 1
    as_root mkdir -p "$root"/{dev,proc,sys,run,tmp,root}
    # Where its programs look for their loader: a link that no package brings.
    as_root ln -s usr/lib "$root/lib"
    echo 'root:x:0:0:root:/root:/bin/sh' | as_root tee "$root/etc/passwd" >/dev/null
    echo 'root:x:0:' | as_root tee "$root/etc/group" >/dev/null
    need_rust_arm64
    # vhost-device-gpio makes its bindings of libgpiod's header.
    need libclang-dev
    for crate in "${BACK_END_CRATES[@]}"; do
        tried_twice "$crate" install_crate "$crate" "$dir" "$root" || { complain "the crate registry does not give $crate"; return 1; }
        as_root install -m 755 "$dir/crates/bin/${crate%%@*}" "$root/usr/bin/"
    done
    as_root rm -rf "$root"/usr/share/{doc,man,locale,qemu} "$root"/usr/lib/python3* "$root"/usr/include
    as_root mke2fs -q -t ext4 -d "$root" "$dir/back-ends.ext4" 512M >"$dir/mke2fs.log" 2>&1 || die "mke2fs failed: $dir/mke2fs.log"
    as_root rm -rf "$root" "$dir/crates" "$dir/crates-target"
}

# install_crate "NAME@VERSION [OPTION...]" DIR ROOT: compiles a program of the crate registry, with the versions that it was
# published with. ROOT has the library that one of them is linked with.
install_crate() {
    local what root=$3 env=(CARGO_TARGET_DIR="$2/crates-target")
    read -ra what <<<"$1"
    case ${what[0]} in
        vhost-device-gpio@*)
            local library=SYSTEM_DEPS_LIBGPIOD
            env+=(${library}_NO_PKG_CONFIG=1 ${library}_LIB=gpiod ${library}_INCLUDE="$root/usr/include"
                ${library}_SEARCH_NATIVE="$root/usr/lib/aarch64-linux-gnu"
                BINDGEN_EXTRA_CLANG_ARGS=-isystem/usr/aarch64-linux-gnu/include
                # What that library needs of a newer libc is there where it runs.
                CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS=-Clink-arg=-Wl,--allow-shlib-undefined)
            ;;
    esac
    run_quietly "$2/${what[0]%@*}.log" env "${env[@]}" \
        cargo install --locked --quiet --target "$ARM64_TARGET" --root "$2/crates" "${what[@]}"
}
