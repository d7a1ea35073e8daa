# What the board boots is built once and kept in the cache, under the hash of what it is built from.
# shellcheck shell=bash

BOARD=$TOP/tests/board
CROSS=aarch64-linux-gnu-

# cached NAME KEY FUNCTION PRODUCT: prints the directory that FUNCTION filled, filling it first if it is not there.
# An entry appears under its name when PRODUCT is in it, by one rename; an interrupted build leaves none.
# Ends with FUNCTION's status when that fails.
cached() {
    local dir=$CACHE/$1-$2 new
    if [ ! -s "$dir/$4" ]; then
        new=$(scratch) || return 1
        "$3" "$new" || return
        [ -s "$new/$4" ] || die "building $1 made no $4"
        as_root rm -rf "$dir"
        mv "$new" "$dir" || return 1
    fi
    echo "$dir"
}
