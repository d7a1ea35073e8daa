# Packages and sources of a Debian suite, on whatever this machine runs.
# shellcheck shell=bash

# private_apt SUITE COMMAND...: runs it with an apt of our own that sees Debian's SUITE; the machine's own is not touched.
private_apt() {
    local suite=$1 root=$CACHE/apt/$1
    shift
    private_apt_index "$suite" "$root" || return 1
    APT_CONFIG=$root/apt.conf "$@"
}

# The index is fetched again when the mirror is another one and when it is a day old: a point release removes the
# packages that an old index names.
private_apt_index() {
    local suite=$1 root=$2 sources
    sources="Types: deb deb-src
URIs: $(debian_mirror)
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"
    [ "$(cat "$root/board.sources" 2>/dev/null)" = "$sources" ] && [ -n "$(find "$root/updated" -mtime -1 2>/dev/null)" ] && return
    rm -rf "$root"
    mkdir -p "$root"/{etc/apt.conf.d,etc/preferences.d,etc/sources.list.d,state/lists/partial,cache/archives/partial}
    touch "$root/state/status"
    echo "$sources" >"$root/etc/sources.list.d/board.sources"
    cat >"$root/apt.conf" <<CONF
Dir::Etc "$root/etc";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$root/etc/sources.list.d";
Dir::State "$root/state";
Dir::State::status "$root/state/status";
Dir::Cache "$root/cache";
APT::Architectures { "$(dpkg --print-architecture)"; "arm64"; };
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
CONF
    tried_twice "the index of Debian $suite" run_quietly "$root/update.log" env APT_CONFIG="$root/apt.conf" apt-get update ||
        { undelivered "the index of Debian $suite"; return 1; }
    echo "$sources" >"$root/board.sources"
    touch "$root/updated"
}

# The mirror that this machine uses already, so that a site's own is respected.
debian_mirror() {
    local mirror=${XEN_VIRTIO_MIRROR:-}
    [ -n "$mirror" ] || mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
        grep -E '/debian/?$' | head -n1) || true
    [ -n "$mirror" ] || die "this machine's apt has no Debian mirror: name one with XEN_VIRTIO_MIRROR=http://…/debian"
    echo "$mirror"
}

# undelivered WHAT: says what could not be had, from where, and what to do.
undelivered() {
    complain "$(debian_mirror) does not give $1; try later, or name another mirror: XEN_VIRTIO_MIRROR=http://…/debian"
}

# fetch_package SUITE PACKAGE DIR: the binary package, into DIR.
fetch_package() {
    local suite=$1 package=$2 dir=$3
    mkdir -p "$dir"
    (
        cd "$dir"
        private_apt "$suite" tried_twice "$package" run_quietly apt.log apt-get download "$package"
    ) || { undelivered "Debian $suite's package $package"; return 1; }
}

# fetch_source SUITE PACKAGE DIR: the source package's tarballs, checked against the hashes of the signed index.
# A mirror may lack the small .dsc of a version whose tarballs it serves; those are all that is needed.
fetch_source() {
    local suite=$1 package=$2 dir=$3
    mkdir -p "$dir"
    (cd "$dir" && tried_twice "the source of $package ($suite)" download_source "$suite" "$package") || {
        ! grep -q 'No space left' "$dir/apt.log" 2>/dev/null || die "there is no room for the source of $package in $dir"
        say "$(debian_mirror) does not serve the source of Debian $suite's package $package"
        return 1
    }
}

download_source() {
    local checked=0 hash name index
    private_apt "$1" apt-get source --download-only "$2" >apt.log 2>&1 || true
    index=$(private_apt "$1" apt-cache showsrc --only-source "$2" | sed -n '/^Checksums-Sha256:/,/^[A-Z]/{/^ /p}')
    while read -r hash _ name; do
        case $name in *.tar.*) ;; *) continue ;; esac
        [ -f "$name" ] || continue
        echo "$hash  $name" | sha256sum --quiet -c - || { rm -f "$name"; return 1; }
        checked=$((checked + 1))
    done <<<"$index"
    [ "$checked" -ge 2 ]
}

# debian_root SUITE PACKAGES DIR LOG: the packages, for arm64, unpacked into DIR; no maintainer script is run.
debian_root() {
    tried_twice "the packages $2" run_quietly "$4" unpack_root "$1" "$2" "$3" ||
        { tail -n 5 "$4" >&2; undelivered "Debian $1's packages $2 (arm64)"; return 1; }
}

unpack_root() {
    as_root rm -rf "$3"
    as_root mmdebstrap --variant=extract --architectures=arm64 --include="$2" "$1" "$3" "$(debian_mirror)"
}
