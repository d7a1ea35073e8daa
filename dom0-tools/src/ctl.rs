//! `xen-virtioctl`: what it asks the service, what it shows, and what it does without it.

pub mod arguments;
pub mod check;
pub mod control;
pub mod create;
pub mod events;
pub mod inspect;
pub mod metrics;
pub mod page;
pub mod rates;
pub mod report;
pub mod slots;
pub mod stats;
pub mod trace;
pub mod xl_config;
