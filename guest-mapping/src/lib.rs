//! What a device may touch of a Xen guest's memory, and how: bus addresses, grants, foreign frames.
//!
//! A device works through [`GuestAccess`]: it maps the rings of its queues, and copies everything else.
//! [`Policy`] is the one place where an address that a guest chose is judged.

mod access;
mod address;
pub mod owned;
mod policy;
pub mod provider;
mod ring;
pub mod syscalls;
pub mod xen;

pub use access::{AccessCounters, AccessError, CopyFault, CopyOp, Direction, GuestAccess};
pub use address::{
    AddressError, BusAddress, GRANT_BIT, Gfn, Gref, PAGE_SIZE, Page, Segment, Segments,
};
pub use policy::{AddressMode, MAX_RING_PAGES, Policy, Refusal};
pub use ring::RingMemory;
pub use vm_memory::{GuestAddress, Permissions};
