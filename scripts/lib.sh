# What the scripts share: messages, the cache, packages, the Rust toolchain. Sourced, never run.
# shellcheck shell=bash
set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XEN_VIRTIO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xen-virtio}
mkdir -p "$CACHE"
# Compiled dependencies outlive a checkout: CI starts from a fresh clone each time.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}
ARM64_TARGET=aarch64-unknown-linux-gnu

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need PACKAGE...: installs those Debian packages that are missing.
need() {
    local missing=() package
    for package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep 'ok installed' >/dev/null || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say "Installing ${missing[*]} (apt)"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# has_package PACKAGE: whether apt could install it.
has_package() { apt-cache policy "$1" 2>/dev/null | grep 'Candidate: [0-9]' >/dev/null; }

# key_of FILE...: the hash that a cached artefact built from these files is kept under.
key_of() { cat "$@" | sha256sum | cut -c1-16; }

# run_logged LOG COMMAND...: runs it quietly; on failure shows the end of what it said.
run_logged() {
    local log=$1
    shift
    "$@" >"$log" 2>&1 </dev/null || {
        tail -n 30 "$log" >&2
        die "failed: $* (whole output: $log)"
    }
}

# What Cargo.toml asks for.
RUST_VERSION=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TOP/Cargo.toml")
rust_is_recent() {
    local version
    version=$("${1:-rustc}" --version 2>/dev/null | cut -d' ' -f2) || return 1
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

# Makes `cargo build --target $ARM64_TARGET` work.
need_rust_arm64() {
    need_rust
    need gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
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
