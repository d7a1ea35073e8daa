//! Serves the virtio devices that xl gives to guests. Runs in dom0, in the foreground.

use anyhow::{Result, ensure};
use clap::Parser;
use nix::sys::prctl::set_name;
use std::ffi::CString;
use std::os::fd::AsFd;
use std::process::ExitCode;
use xen_virtio_dom0_tools::arguments::{Arguments, Role};
use xen_virtio_dom0_tools::config::Config;
use xen_virtio_dom0_tools::ctl::control;
use xen_virtio_dom0_tools::ipc::WorkerEnds;
use xen_virtio_dom0_tools::program::keeper;
use xen_virtio_dom0_tools::{log, network_helper, serve_vhost_user, supervisor, worker};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !log::start() && arguments.role.is_none() {
        tracing::warn!(
            "{}={:?} is none of error, warn, info, debug, trace; info is logged",
            log::LEVEL_VARIABLE,
            std::env::var_os(log::LEVEL_VARIABLE).unwrap_or_default()
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
    let config = || match &arguments.config {
        Some(path) => Config::load(path),
        None => Config::load_default(),
    };
    match &arguments.role {
        None => {
            if let Some(socket) = &arguments.network {
                network_helper::leave_to(socket.clone());
            }
            supervisor::run(config()?, control::SOCKET_PATH.as_ref())
        }
        Some(Role::Network) => {
            call_process("virtio-network")?;
            network_helper::run()
        }
        Some(Role::ServeVhostUser { socket, device }) => {
            serve_vhost_user::run(socket, device, &config()?)
        }
        // For whoever looks at the processes; the supervisor says which guest it is.
        Some(Role::Worker { domid }) => {
            call_process(&format!("virtio-dom{domid}"))?;
            let ends = WorkerEnds {
                commands: std::io::stdin().as_fd().try_clone_to_owned()?,
                answers: std::io::stdout().as_fd().try_clone_to_owned()?,
            };
            // The pipe is closed with the connection.
            rustix::stdio::dup2_stdout(std::io::stderr())?;
            worker::run(ends)
        }
        Some(Role::BackEnd(keeping)) => {
            call_process("virtio-keeper")?;
            keeper::run(keeping)
        }
        Some(Role::BackEndProgram(becoming)) => {
            keeper::become_program(becoming).map(|never| match never {})
        }
    }
}

/// Has the kernel call this process so, in its messages and wherever it shows no arguments: by what it was started from, it would
/// be "exe".
fn call_process(name: &str) -> Result<()> {
    Ok(set_name(&CString::new(name)?)?)
}
