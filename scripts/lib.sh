# What the scripts share: messages, the cache, packages, the Rust toolchain. Sourced, never run.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XEN_VIRTIO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xen-virtio}
mkdir -p "$CACHE"
# Compiled dependencies outlive a checkout: CI starts from a fresh clone each time.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}
ARM64_TARGET=aarch64-unknown-linux-gnu
AMD64_TARGET=x86_64-unknown-linux-gnu
# The exit status of scripts/board where no Xen can be had.
NO_XEN=5
# The exit status of what could not be fetched, as opposed to what failed when it was there.
UNDELIVERED=6

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
complain() { printf 'error: %s\n' "$*" >&2; }
die() { complain "$@"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# scratch: a directory of this run's own in the cache, removed when the run ends, whichever way.
scratch() { mktemp -d "$CACHE/tmp.$$.XXXXXX"; }
remove_scratch() {
    local dir pid
    for dir in "$CACHE"/tmp.*; do
        [ -d "$dir" ] || continue
        pid=${dir##*/tmp.} && pid=${pid%%.*}
        # Another run's stays as long as that one runs; what a killed one left goes.
        [ "$pid" != $$ ] && kill -0 "$pid" 2>/dev/null && continue
        rm -rf "$dir" 2>/dev/null || as_root rm -rf "$dir"
    done
}
trap remove_scratch EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# tried_twice WHAT COMMAND...: for downloads, which fail for a moment as often as for good.
tried_twice() {
    local what=$1
    shift
    "$@" && return
    say "$what: failed, trying once more"
    sleep 5
    "$@"
}

# need PACKAGE...: installs those Debian packages that are missing.
need() {
    local missing=() package
    for package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep 'ok installed' >/dev/null || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say "Installing ${missing[*]} (apt)"
    tried_twice "installing ${missing[*]}" install_packages "${missing[@]}" ||
        die "apt could not install ${missing[*]}; what it says: apt-get update && apt-get install ${missing[*]}"
}

install_packages() {
    as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# has_package PACKAGE: whether apt could install it.
has_package() { apt-cache policy "$1" 2>/dev/null | grep 'Candidate: [0-9]' >/dev/null; }

# key_of FILE...: the hash that a cached artefact built from these files is kept under.
key_of() { cat "$@" | sha256sum | cut -c1-16; }

# run_quietly LOG COMMAND...: what it says goes to LOG.
run_quietly() {
    local log=$1
    shift
    "$@" >"$log" 2>&1 </dev/null
}

# run_logged LOG COMMAND...: runs it quietly; on failure shows the errors and the end of what it said, and keeps the rest.
run_logged() {
    run_quietly "$@" || {
        local kept=$CACHE/logs/failed-${1##*/}
        { mkdir -p "$CACHE/logs" && cp "$1" "$kept"; } || kept="(not kept)"
        # Where several jobs run, the end is not where the error is.
        grep -m 10 -E 'error:|\*\*\*' "$1" >&2 || true
        tail -n 20 "$1" >&2
        die "failed: ${*:2}; all that it said: $kept"
    }
}

# What Cargo.toml asks for.
RUST_VERSION=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TOP/Cargo.toml")
rust_is_recent() {
    local version
    version=$(rustc --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ "$(printf '%s\n%s\n' "$RUST_VERSION" "$version" | sort -V | sed 1q)" = "$RUST_VERSION" ]
}

# Puts a recent enough cargo first on PATH, from Debian's packages where there is none.
need_rust() {
    need gcc libc6-dev
    rust_is_recent && return
    if has_package rustc-web; then
        need rustc-web cargo-web
    else
        need rustc cargo
    fi
    export PATH=/usr/bin:$PATH
    rust_is_recent || die "rustc $RUST_VERSION or later is needed, found $(rustc --version); install it from https://rustup.rs"
}

# Like need_rust, with clippy and rustfmt.
need_rust_lints() {
    need_rust
    cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 && return
    if has_package rust-web-clippy; then
        need rust-web-clippy rustfmt-web
    else
        need rust-clippy rustfmt
    fi
}

# need_cargo_tool NAME VERSION: puts a program of crates.io first on PATH, from the cache once it was built.
need_cargo_tool() {
    local root=$CACHE/tool-$1-$2 dir
    need_rust
    export PATH=$root/bin:$PATH
    [ -x "$root/bin/$1" ] && return
    dir=$(scratch)
    say "Building $1 $2, once"
    # It runs for a second, and is built for a minute: without optimization.
    CARGO_TARGET_DIR=$dir/target run_logged "$dir/$1.log" \
        cargo install --locked --debug --root "$dir/root" --version "$2" "$1"
    # Another run may have been faster.
    mv -T "$dir/root" "$root" 2>/dev/null || [ -x "$root/bin/$1" ]
    rm -rf "$dir"
}

# shipped_flags TARGET: rustc's, for programs that are shipped. Static: what is built on a new system starts on an old one,
# whichever glibc that has. Where this machine keeps the sources of crates is not in them, so that the same commit gives the
# same bytes on another one.
shipped_flags() {
    local sources flags='-C target-feature=+crt-static'
    cargo fetch --quiet --locked --target "$1" --manifest-path "$TOP/Cargo.toml" || die "cargo could not fetch what Cargo.lock names"
    for sources in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
        flags+=" --remap-path-prefix=$sources=/crates/"
    done
    echo "$flags"
}

# Makes `cargo build --target $ARM64_TARGET` work.
need_rust_arm64() {
    need_rust
    need gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$(shipped_flags "$ARM64_TARGET")
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS
    [ -d "$(rustc --print sysroot)/lib/rustlib/$ARM64_TARGET/lib" ] && return
    if command -v rustup >/dev/null && rustup target add "$ARM64_TARGET" >/dev/null 2>&1; then return; fi
    # Debian's own compiler takes its arm64 standard library from a foreign-architecture package.
    as_root dpkg --add-architecture arm64
    as_root apt-get update -qq
    if has_package libstd-rust-web-dev:arm64; then
        need rustc-web cargo-web libstd-rust-web-dev:arm64
    else
        need rustc cargo libstd-rust-dev:arm64
    fi
    export PATH=/usr/bin:$PATH
}

# build_amd64 CARGO_OPTION...: release amd64 programs, in $CARGO_TARGET_DIR/$AMD64_TARGET/release.
build_amd64() {
    need_rust
    local flags
    flags=$(shipped_flags "$AMD64_TARGET")
    # For nothing else: where this is the machine's own target, macros are built for it too, which cannot be static.
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS=$flags cargo build --quiet --locked --release --target "$AMD64_TARGET" --manifest-path "$TOP/Cargo.toml" "$@"
}

# build_arm64 CARGO_OPTION...: release arm64 programs, in ARM64_BINARIES.
ARM64_BINARIES=$CARGO_TARGET_DIR/$ARM64_TARGET/release
build_arm64() {
    need_rust_arm64
    cargo build --quiet --locked --release --target "$ARM64_TARGET" --manifest-path "$TOP/Cargo.toml" "$@"
}
