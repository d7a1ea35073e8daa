//! The guest driver of `guest-io` on the simulator, for tests, fuzz seeds and benches.
#![forbid(unsafe_code)]

mod echo;
mod mortal;
mod network;
mod platform;
mod reconnecting;
mod shadow_echo;
mod workload;

pub use echo::Echo;
pub use mortal::{
    MakeDevice, allow_descriptors, drive_over_deaths, drive_over_deaths_by, wait_for_all,
};
pub use network::{Flood, MAC, Wire, network};
pub use platform::{
    Staged, allocate, come_to_rest, disk_device, disk_of, drive, driver, driver_by, numbered_disk,
    sleeps,
};
pub use reconnecting::{Look, Reconnecting, arrive};
pub use shadow_echo::{Framing, SAYS_NOTHING, ShadowEcho};
pub use workload::{Operation, WORKLOADS, Workload};
pub use xen_virtio_guest_io::*;
