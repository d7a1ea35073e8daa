//! Serves the virtio devices that xl gives to guests. Runs in dom0, in the foreground.

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use xen_virtio_dom0_tools::config::Config;
use xen_virtio_dom0_tools::{control, supervisor, worker};

/// Serves virtio devices to Xen guests, as their xl configurations say.
#[derive(Parser)]
#[command(name = "xen-virtiod", version)]
struct Arguments {
    /// A configuration other than /etc/xen-virtiod/config.toml, which is read if it is there.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Serves one guest; only xen-virtiod itself starts this.
    #[command(hide = true)]
    Worker { domid: u16 },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let wanted = std::env::var("XEN_VIRTIOD_LOG").unwrap_or_else(|_| "info".to_owned());
    let level = wanted.parse::<LevelFilter>();
    // journald has its own clock, and so has a terminal's reader.
    tracing_subscriber::fmt()
        .with_max_level(*level.as_ref().unwrap_or(&LevelFilter::INFO))
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .init();
    if level.is_err() && arguments.role.is_none() {
        tracing::warn!(
            "XEN_VIRTIOD_LOG={wanted} is none of error, warn, info, debug, trace; info is logged"
        );
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        rustix::param::page_size() == xen_virtio_guest_mapping::PAGE_SIZE,
        "this kernel has pages of {} bytes; xen-virtiod needs one with Xen's own 4096 (CONFIG_ARM64_4K_PAGES)",
        rustix::param::page_size()
    );
    match &arguments.role {
        None => {
            let config = match &arguments.config {
                Some(path) => Config::load(path)?,
                None => Config::load_default()?,
            };
            supervisor::run(config, control::SOCKET_PATH.as_ref())
        }
        Some(Role::Worker { domid }) => {
            let _guest = tracing::error_span!("guest", domid).entered();
            worker::run(std::io::stdin().as_fd().try_clone_to_owned()?)
        }
    }
}
