//! Guest memory through Xen: grants from `/dev/xen/gntdev`, foreign frames from `/dev/xen/privcmd`.

pub mod abi;
mod frame_cache;
// The system calls of Xen's devices, and the memory that they map.
#[allow(unsafe_code)]
mod gntdev;
#[allow(unsafe_code)]
mod mapping;
#[allow(unsafe_code)]
mod privcmd;

pub use frame_cache::FrameCache;
pub use gntdev::GrantAccess;
pub use mapping::Mapping;
pub use privcmd::{FrameAccess, Privcmd};

/// A domain's number, as Xen's ABI has it.
pub use xen_sys::domid_t as RawDomid;

use std::fmt;

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domid(pub RawDomid);

impl fmt::Display for Domid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
