//! What a worker gives up before it looks at anything that its guest wrote.
//!
//! It keeps the descriptors that its supervisor handed over, and may use them only as the filter says.

use crate::devices::{self, DeviceKind, SyscallRule};
use crate::toolstack::libxl::MAX_DEVICES;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use xen_virtio_guest_mapping::xen::abi as memory;
use xen_virtio_transport::xen::abi as events;

/// Worker `n` runs as this user and group, plus `n`: nobody else's, where the distribution keeps to
/// systemd's plan of user ids.
const FIRST_USER: u32 = 0x7800_0000;

/// Descriptors that a worker may have open: those for Xen, its connection, and for each device what it is made of, with one
/// for each queue of those that back-ends serve, and for whoever is attached to consoles or connected by sockets: some 300 of
/// each device.
const MAX_DESCRIPTORS: u64 = 4096;
/// Bytes of address space: rings, cached frames and buffers of all devices, and the program; and of each device what it shares
/// with a back-end, beside what the worker before it has shared.
const MAX_ADDRESS_SPACE: u64 = (512 << 20) + 2 * MAX_DEVICES as u64 * devices::MAX_SHARED;
/// Bytes that io_uring may keep in memory: more than eleven disks have.
const MAX_LOCKED: u64 = 64 << 20;

/// The directory that becomes the worker's root: any that is there.
const MOUNT_POINT: &str = "/proc";

/// There on a kernel that has network namespaces.
const NETWORK_NAMESPACE: &str = "/proc/self/ns/net";

/// How readily the kernel ends this process when memory runs out, from -1000 to 1000.
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";
/// A worker goes before the supervisor, whose value it has inherited, and before most of dom0: another worker
/// follows it.
const WORKER_OOM_SCORE_ADJ: &str = "500";

/// When memory runs out, this process ends before the service does.
///
/// # Errors
///
/// The system's.
pub fn goes_before_the_service() -> Result<()> {
    fs::write(OOM_SCORE_ADJ, WORKER_OOM_SCORE_ADJ)
        .with_context(|| format!("writing {OOM_SCORE_ADJ}"))
}

/// The user, and the group, that serves guest `domid` and does nothing else.
pub fn user(domid: u16) -> u32 {
    FIRST_USER + u32::from(domid)
}

/// The guest that processes of `user` serve, if they are workers.
pub(crate) fn guest_of(user: u32) -> Option<u16> {
    user.checked_sub(FIRST_USER)?.try_into().ok()
}

/// Says what the kernel lacks of a worker's sandbox: once, for all workers.
pub(crate) fn report_missing() {
    if !Path::new(NETWORK_NAMESPACE).exists() {
        tracing::warn!(
            "the kernel has no network namespaces (CONFIG_NET_NS): workers stay in dom0's network; no worker \
             can make a socket there, since its system call filter and its io_urings refuse that"
        );
    }
}

/// Makes this process the sandboxed worker that serves guest `domid`. It must have one thread, and be root.
/// `prepare` makes what the filter lets nobody make. It runs without privilege, before the filter.
///
/// # Errors
///
/// What could not be given up; the worker must not serve then.
pub fn enter<T>(domid: u16, prepare: impl FnOnce() -> T) -> Result<T> {
    goes_before_the_service()?;
    leave_file_systems().context("leaving the file systems")?;
    match unshare(CloneFlags::CLONE_NEWNET) {
        // A kernel without network namespaces, see `report_missing`.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(error) => return Err(error).context("leaving the network"),
    }
    for (resource, limit) in [
        (Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (Resource::RLIMIT_AS, MAX_ADDRESS_SPACE),
        (Resource::RLIMIT_MEMLOCK, MAX_LOCKED),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, limit, limit).with_context(|| format!("limiting {resource:?}"))?;
    }
    let id = user(domid);
    setgroups(&[]).context("leaving the groups")?;
    setresgid(Gid::from_raw(id), Gid::from_raw(id), Gid::from_raw(id)).context("changing group")?;
    // The last of root's capabilities go with this.
    setresuid(Uid::from_raw(id), Uid::from_raw(id), Uid::from_raw(id)).context("changing user")?;
    prctl::set_no_new_privs().context("giving up new privileges")?;
    // As this user: a ring that root had made would not be held to MAX_LOCKED.
    let prepared = prepare();
    let filter = filter().context("building the system call filter")?;
    seccompiler::apply_filter(&filter).context("installing the system call filter")?;
    Ok(prepared)
}

/// An empty root that cannot be written, in a mount namespace of its own.
fn leave_file_systems() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing = None::<&str>;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("none"),
        MOUNT_POINT,
        Some("tmpfs"),
        flags,
        Some("size=4k"),
    )?;
    chdir(MOUNT_POINT)?;
    // The old root comes to lie on top of the new one, from where it is taken away.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

/// Everything else kills the worker.
fn filter() -> Result<BpfProgram> {
    let always = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_ppoll,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_getrusage,
        libc::SYS_clock_gettime,
        libc::SYS_getrandom,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_getpid,
        libc::SYS_gettid,
        // A wait for memory, of which nothing tells.
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, one_of(1, &IOCTLS)?);
    // Of its own user there is itself alone.
    let process = [libc::PRIO_PROCESS.into()];
    rules.insert(libc::SYS_setpriority, one_of(0, &process)?);
    // To abort by, so that its death says why.
    let own = [std::process::id().into()];
    rules.insert(libc::SYS_tgkill, one_of(0, &own)?);
    for SyscallRule { call, argument } in devices::all_kinds().flat_map(DeviceKind::syscalls) {
        match argument {
            None => drop(rules.insert(call, Vec::new())),
            Some((argument, values)) => {
                rules
                    .entry(call)
                    .or_default()
                    .extend(one_of(argument, &values)?);
            }
        }
    }
    // No memory that can be executed.
    let not_executable = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64),
        0,
    )?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![not_executable.clone()])?]);
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

const IOCTLS: [u64; 8] = [
    memory::IOCTL_GNTDEV_MAP_GRANT_REF,
    memory::IOCTL_GNTDEV_UNMAP_GRANT_REF,
    memory::IOCTL_GNTDEV_GRANT_COPY,
    memory::IOCTL_PRIVCMD_MMAPBATCH_V2,
    memory::IOCTL_PRIVCMD_MMAP_RESOURCE,
    events::IOCTL_PRIVCMD_DM_OP,
    events::IOCTL_EVTCHN_BIND_INTERDOMAIN,
    events::IOCTL_EVTCHN_NOTIFY,
];

/// A system call whose argument number `argument` is one of `values`.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>> {
    let mut rules = Vec::new();
    for value in values {
        let condition =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        rules.push(SeccompRule::new(vec![condition])?);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_can_be_built() {
        assert!(!filter().unwrap().is_empty());
    }
}
