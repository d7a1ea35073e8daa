# Packages and sources of Debian $SUITE, on whatever this machine runs.
# shellcheck shell=bash

# An apt of our own that sees Debian $SUITE, whatever this machine runs; the machine's own is not touched.
private_apt() {
    local root=$CACHE/apt
    if [ ! -f "$root/apt.conf" ]; then
        mkdir -p "$root"/{etc/apt.conf.d,etc/preferences.d,etc/sources.list.d,state/lists/partial,cache/archives/partial}
        touch "$root/state/status"
        cat >"$root/etc/sources.list.d/board.sources" <<SOURCES
Types: deb deb-src
URIs: $(debian_mirror)
Suites: $SUITE
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
        cat >"$root/apt.conf.new" <<CONF
Dir::Etc "$root/etc";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$root/etc/sources.list.d";
Dir::State "$root/state";
Dir::State::status "$root/state/status";
Dir::Cache "$root/cache";
APT::Architectures { "$(dpkg --print-architecture)"; "arm64"; };
APT::Sandbox::User "root";
CONF
        APT_CONFIG=$root/apt.conf.new run_logged "$CACHE/apt-update.log" apt-get update
        mv "$root/apt.conf.new" "$root/apt.conf"
    fi
    APT_CONFIG=$root/apt.conf "$@"
}

# The mirror that this machine uses already, so that a site's own is respected.
debian_mirror() {
    local mirror
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
        grep -E '/debian/?$' | head -n1) || true
    echo "${mirror:-http://deb.debian.org/debian}"
}

# fetch_source PACKAGE DIR: the source package's tarballs, checked against the hashes of the signed index.
# A mirror may lack the small .dsc of a version whose tarballs it serves; those are all that is needed.
fetch_source() {
    local package=$1 dir=$2
    mkdir -p "$dir"
    (
        cd "$dir"
        private_apt apt-get source --download-only "$package" >apt.log 2>&1 || true
        private_apt apt-get source --print-uris "$package" >uris.log 2>/dev/null || true
        local index
        index=$(private_apt apt-cache showsrc --only-source "$package" | sed -n '/^Checksums-Sha256:/,/^[A-Z]/{/^ /p}')
        local checked=0 hash name
        while read -r hash _ name; do
            case $name in *.tar.*) ;; *) continue ;; esac
            [ -f "$name" ] || continue
            echo "$hash  $name" | sha256sum --quiet -c - || die "$dir/$name does not match Debian's index"
            checked=$((checked + 1))
        done <<<"$index"
        [ "$checked" -ge 2 ] || { cat apt.log >&2; die "$(debian_mirror) does not give Debian's source package $package: try later, or another mirror in apt's sources"; }
    )
}
