# A worker has no privilege, no file system, no network, and few system calls.
make_disk /tmp/disk.img 32
start_daemon
guest g idle "disk = [ $(disk /tmp/disk.img) ]"
create g
said g 'guest: done' >/dev/null
worker=$(pids_of "$(domid g)")
status() { awk -v field="$1:" '$1 == field { $1 = ""; sub("^ ", ""); print }' "/proc/$worker/status"; }
user=$(status Uid) && user=${user%%[[:space:]]*}
note "user $user, capabilities $(status CapEff), NoNewPrivs $(status NoNewPrivs), Seccomp $(status Seccomp)"
[ "$user" != 0 ] || fail "the worker is root"
[ "$(status Groups)" = "" ] || fail "the worker is in the groups $(status Groups)"
[ "$(status CapEff)$(status CapPrm)$(status CapInh)$(status CapAmb)" = "$(printf '%064d' 0)" ] ||
    fail "the worker has capabilities"
[ "$(status NoNewPrivs)" = 1 ] || fail "the worker may gain privileges"
[ "$(status Seccomp)" = 2 ] || fail "the worker has no system call filter"
[ -z "$(ls -A "/proc/$worker/root/")" ] || fail "the worker sees files: $(ls -A "/proc/$worker/root/")"
for namespace in mnt net; do
    [ "$(readlink "/proc/$worker/ns/$namespace")" != "$(readlink "/proc/$DAEMON/ns/$namespace")" ] ||
        fail "the worker shares its supervisor's $namespace namespace"
done
note "open: $(readlink /proc/$worker/fd/* | sort | uniq -c | awk '{ print $2 " x" $1 }' | tr '\n' ' ')"
ls -l "/proc/$worker/fd" | grep -q "$DAEMON_LOG" && fail "the worker can write the service's log"
[ "$(cat "/proc/$worker/oom_score_adj")" = 500 ] ||
    fail "the OOM killer takes the worker as readily as others: $(cat "/proc/$worker/oom_score_adj")"
# What it could try, tried from where it is.
make_disk /tmp/other.img 4
guest other idle "disk = [ $(disk /tmp/other.img) ]"
create other
own=$(domid g) other=$(domid other)
said other 'guest: done' >/dev/null
# outcome ACTION: what the probe says of it, or what killed it.
outcome() {
    local status=0 text
    text=$(sandbox-probe "$own" "$other" "$1" 2>&1) || status=$?
    case $status in
        0) echo "$text" ;;
        159) echo "killed by SIGSYS" ;;
        *) echo "$text (status $status)" ;;
    esac
}
# ends ACTION PATTERN: it ends so, and for no other reason.
ends() {
    local text
    text=$(outcome "$1")
    note "$1: ${text:0:200}"
    # shellcheck disable=SC2053 # a pattern
    [[ $text = $2 ]] || fail "$1 was to end as '$2', and ended as '$text'"
}
ends map-own 'done'
ends ring-own 'done'
ends map-other "refused: reading the guest's memory: frame 0x40000 of the guest could not be mapped (errno 1)"
ends serve-other 'refused: Xen gives no ioreq server*: Operation not permitted (os error 1)'
for action in ring-socket ring-open ring-nop ring-descriptor; do
    ends $action 'refused: Permission denied (os error 13)'
done
for action in open create tcp udp unix signal exec root ring-new ring-eventfd; do
    ends $action 'killed by SIGSYS'
done
# gntdev is restricted to no guest: docs/threat-model.md says what a worker reads by it.
ends console-other 'done: *guest: done*'
ends xenstore-other 'done: *memory/target*'
destroy other
destroy g
