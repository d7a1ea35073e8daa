//! The programs of dom0: `xen-virtiod`, which supervises one worker process a guest, and `xen-virtioctl`.

pub mod arguments;
pub mod config;
mod connections;
pub mod created;
pub mod ctl;
mod devices;
pub mod doctor;
pub mod guest_state;
pub mod ipc;
pub mod log;
pub mod program;
pub mod serve_vhost_user;
pub mod supervisor;
// Takes over what systemd has opened.
#[allow(unsafe_code)]
mod systemd;
mod text;
pub mod toolstack;
pub mod worker;

pub use devices::net::helper as network_helper;
