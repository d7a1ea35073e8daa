//! The programs of dom0: `xen-virtiod`, which supervises one worker process a guest, and `xen-virtioctl`.

mod budget;
pub mod config;
pub mod control;
pub mod demo;
mod devices;
pub mod event_loop;
pub mod guest_file;
pub mod guest_state;
pub mod ipc;
pub mod libxl;
pub mod log;
pub mod polling;
pub mod report;
pub mod sandbox;
pub mod stats;
pub mod supervisor;
mod text;
pub mod worker;
pub mod xenstore;
pub mod xl_config;
