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
# What it could try, tried from where it is.
make_disk /tmp/other.img 4
guest other idle "disk = [ $(disk /tmp/other.img) ]"
create other
own=$(domid g) other=$(domid other)
[ "$(prisoner "$own" "$other" map-own)" = done ] || fail "a worker cannot read its own guest"
for action in map-other serve-other open create tcp udp unix signal exec root; do
    status=0 said=$(prisoner "$own" "$other" $action 2>&1) || status=$?
    # 159: killed by SIGSYS.
    [ $status = 159 ] || [[ $status = 0 && $said = refused:* ]] || fail "$action: $said (status $status)"
    note "$action: ${said:-killed}"
done
destroy other
destroy g
