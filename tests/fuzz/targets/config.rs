//! Any configuration file, and any xl file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use xen_virtio_dom0_tools::config::Config;
use xen_virtio_dom0_tools::ctl::xl_config;
// For what the linker wants to find in it.
use xen_virtio_fuzz as _;

fuzz_target!(|text: &str| {
    let config = Config::parse(Path::new("config.toml"), text);
    let _ = xl_config::check(text.as_bytes(), &config.unwrap_or_default());
});
