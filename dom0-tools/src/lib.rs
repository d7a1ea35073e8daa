//! The programs of dom0: `xen-virtiod`, which supervises one worker process a guest, and `xen-virtioctl`.

pub mod config;
pub mod control;
pub mod demo;
pub mod ipc;
pub mod libxl;
pub mod polling;
pub mod report;
pub mod sandbox;
pub mod server;
pub mod stats;
pub mod supervisor;
pub mod worker;
pub mod xenstore;
pub mod xl_config;
