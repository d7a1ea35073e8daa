//! Pausing of domains (`HYPERVISOR_domctl`, `xen/domctl.h`), as whoever builds them does it.

use super::abi::{self, Domctl};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::Permissions;
use xen_virtio_guest_mapping::PAGE_SIZE;
use xen_virtio_guest_mapping::xen::{Domid, Mapping};

/// The versions of the interface (`XEN_DOMCTL_INTERFACE_VERSION`) from Xen 4.17 to 4.22. What is called here is the same in all.
const VERSIONS: [u32; 4] = [0x15, 0x16, 0x17, 0x18];

/// What dom0 may do to domains.
pub struct DomainControl {
    privcmd: File,
    /// The operation, in memory that stays where it is while Xen reads it.
    operation: Mapping,
}

impl DomainControl {
    /// `privcmd` is an open `/dev/xen/privcmd` that is restricted to no guest, `hypercall` an open `/dev/xen/hypercall`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn new(privcmd: File, hypercall: &File) -> io::Result<Self> {
        Ok(Self {
            privcmd,
            operation: Mapping::new(hypercall, 0, PAGE_SIZE, Permissions::ReadWrite)?,
        })
    }

    /// Keeps a domain's vCPUs from running, until [`DomainControl::unpause`] was called as often as this and as whoever else has
    /// paused it has called theirs: Xen counts.
    ///
    /// # Errors
    ///
    /// Xen's: there is no such domain, or this is not its dom0, or its interface is of no version that is known here (`EACCES`).
    pub fn pause(&self, domid: Domid) -> io::Result<()> {
        self.call(abi::XEN_DOMCTL_PAUSEDOMAIN, domid)
    }

    /// Takes one [`DomainControl::pause`] back.
    ///
    /// # Errors
    ///
    /// As for [`DomainControl::pause`]; and `EINVAL` if nobody has paused it.
    pub fn unpause(&self, domid: Domid) -> io::Result<()> {
        self.call(abi::XEN_DOMCTL_UNPAUSEDOMAIN, domid)
    }

    fn call(&self, cmd: u32, domid: Domid) -> io::Result<()> {
        let mut result = Ok(());
        for version in VERSIONS {
            result = self.call_version(version, cmd, domid);
            let is_other = |error: &io::Error| error.raw_os_error() == Some(libc::EACCES);
            if !result.as_ref().is_err_and(is_other) {
                break;
            }
        }
        result
    }

    fn call_version(&self, interface_version: u32, cmd: u32, domid: Domid) -> io::Result<()> {
        let operation = self.operation.start().cast::<Domctl>();
        // SAFETY: a page of this mapping has room for it, and nobody else reads or writes that.
        unsafe {
            operation.write(Domctl {
                cmd,
                interface_version,
                domain: domid.0,
                pad: [0; 3],
                argument: [0; 16],
            });
        }
        let call = abi::PrivcmdHypercall {
            op: abi::HYPERVISOR_DOMCTL,
            arg: [operation.as_ptr() as u64, 0, 0, 0, 0],
        };
        // SAFETY: Xen reads and writes a whole `struct xen_domctl`, which pauses a domain or lets it run and does nothing else.
        unsafe { abi::privcmd_hypercall(self.privcmd.as_raw_fd(), &raw const call) }?;
        Ok(())
    }
}
