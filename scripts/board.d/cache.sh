# What the board boots is built once and kept in the cache, under the hash of what it is built from.
# shellcheck shell=bash

BOARD=$TOP/tests/board
SUITE=trixie
CROSS=aarch64-linux-gnu-

# cached NAME KEY FUNCTION: prints the directory that FUNCTION filled, filling it first if it is not there.
cached() {
    local dir=$CACHE/$1-$2
    if [ ! -e "$dir/done" ]; then
        rm -rf "$dir" && mkdir -p "$dir"
        "$3" "$dir"
        touch "$dir/done"
    fi
    echo "$dir"
}
