//! Who says which devices a guest has: libxl, in xenstore, or a file of ours, which is written there.

pub mod guest_file;
pub mod libxl;
pub mod xenstore;
