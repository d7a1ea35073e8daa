# libxl of Xen 4.17 knows neither grant_usage nor virtio=. For a guest whose disks grant, this does by hand what a newer
# libxl does: a partial device tree for the guest, and the nodes of each disk in xenstore. Sourced by dom0.sh.
# shellcheck shell=bash

# xl, where the newer one's create and destroy are wanted.
xl() {
    case $1 in
        create) create_by_hand "${@:2}" ;;
        destroy) destroy_by_hand "$2" ;;
        *) command xl "$@" ;;
    esac
}

# create_by_hand XL_OPTION... FILE: as `xl create`, which fails for a disk that nobody serves within ten seconds.
create_by_hand() {
    local options=("${@:1:$#-1}") file=${!#} name domid disks line
    name=$(sed -n "s/^name = '\(.*\)'/\1/p" "$file")
    mapfile -t disks <<<"$(quoted "$file" | grep specification=virtio)"
    if ! printf '%s\n' "${disks[@]}" | grep -q grant_usage=1; then
        # By frames this libxl does it all, but for the word.
        sed 's/grant_usage=0, //g' "$file" >"$file.4.17"
        command xl create "${options[@]}" "$file.4.17"
        return
    fi
    {
        grep -v '^disk = ' "$file"
        echo "disk = [ $(quoted "$file" | grep -v specification=virtio | sed "s/.*/'&'/" | paste -sd,) ]"
        # For its shared interrupts, of which a guest has none otherwise.
        echo "vuart = 'sbsa_uart'"
        echo "device_tree = '$file.dtb'"
    } >"$file.4.17"
    partial_device_tree "${disks[@]}" | dtc -q -I dts -O dtb -o "$file.dtb"
    command xl create -p "${options[@]}" "$file.4.17" || return 1
    domid=$(domid "$name")
    write_nodes "$domid" "${disks[@]}"
    for line in "${disks[@]}"; do
        if ! is_within 10 is_ready "$domid" "$line" 2>/dev/null; then
            destroy_by_hand "$name"
            return 1
        fi
    done
    [[ " ${options[*]} " = *' -p '* ]] || command xl unpause "$name"
}

destroy_by_hand() {
    local domid status=0
    domid=$(domid "$1")
    command xl destroy "$1" || status=$?
    [ -z "$domid" ] || xenstore-rm "backend/virtio_disk/$domid" 2>/dev/null || true
    return $status
}

# The strings of the file's disk = [ … ].
quoted() { sed -n 's/^disk = //p' "$1" | grep -o "'[^']*'" | tr -d "'"; }
# parameter LINE NAME: its value in a disk's line.
parameter() { sed -n "s/.*\b$2=\([^,]*\).*/\1/p" <<<"$1"; }
# devid LINE: xvda is 51712.
devid() {
    local vdev
    vdev=$(parameter "$1" vdev)
    echo $((51712 + 16 * ($(printf '%d' "'${vdev#xvd}") - 97)))
}
is_ready() { [ "$(xenstore-read "backend/virtio_disk/$1/$(devid "$2")/state")" = 2 ]; }

# What the guest is told of its disks, by our own tool: which kind they are is none of a device tree's.
partial_device_tree() {
    local line
    mkdir -p /etc/xen-virtiod/guests
    for line; do
        printf '[[device]]\ntype = "rng"\n'
        [ "$(parameter "$line" grant_usage)" != 0 ] || echo 'grant-usage = false'
    done >/etc/xen-virtiod/guests/only-a-tree.toml
    xen-virtioctl device-tree only-a-tree
    rm /etc/xen-virtiod/guests/only-a-tree.toml
}

write_nodes() {
    local domid=$1 line path index=0 nodes=()
    shift
    for line; do
        path=backend/virtio_disk/$domid/$(devid "$line")
        nodes+=("$path/params" "$(parameter "$line" target)" "$path/dev" "$(parameter "$line" vdev)")
        nodes+=("$path/mode" "$([ "$(parameter "$line" access)" = rw ] && echo w || echo r)")
        nodes+=("$path/base" $((0x2000000 + index * 0x200)) "$path/irq" $((33 + index)))
        nodes+=("$path/grant_usage" "$(parameter "$line" grant_usage)" "$path/specification" virtio "$path/transport" mmio)
        nodes+=("$path/frontend" "/local/domain/$domid/device/virtio_disk/$(devid "$line")" "$path/frontend-id" "$domid")
        nodes+=("$path/online" 1 "$path/state" 1)
        index=$((index + 1))
    done
    xenstore-write "${nodes[@]}"
}
