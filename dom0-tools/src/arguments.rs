//! The command line of `xen-virtiod`, which its manual page and completions are made from too.

use crate::program::keeper::{Becoming, Keeping};
use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// Serves virtio devices to Xen guests, as their xl configurations say.
#[derive(Parser)]
#[command(name = "xen-virtiod", version)]
pub struct Arguments {
    /// A configuration other than /etc/xen-virtiod/config.toml, which is read if it is there.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Leaves network interfaces to the process that listens at this socket.
    #[arg(long, value_name = "SOCKET")]
    pub network: Option<PathBuf>,
    #[command(subcommand)]
    pub role: Option<Role>,
}

/// What it is, if not the service.
#[derive(Subcommand)]
pub enum Role {
    /// Serves one guest; only xen-virtiod itself starts this.
    #[command(hide = true)]
    Worker { domid: u16 },
    /// Serves a device to any VMM at a vhost-user socket, until it is ended.
    ServeVhostUser {
        /// Where to listen.
        socket: PathBuf,
        /// The device, as a line of xen_virtio = [ … ] has it: "blk, path=/srv/disk.img", "rng".
        device: String,
    },
    /// Keeps a back-end's program running; only xen-virtiod itself starts this.
    #[command(hide = true)]
    BackEnd(Keeping),
    /// Opens and makes network interfaces for the service; only systemd starts this, with a socket.
    #[command(hide = true)]
    Network,
    /// Becomes that program.
    #[command(hide = true)]
    BackEndProgram(Becoming),
}
