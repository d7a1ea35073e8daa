//! Shows what `xen-virtiod` does, and tries the same devices on a simulated guest.

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;
use xen_virtio_dom0_tools::{control, demo};

/// Shows the virtio devices of this host's Xen guests.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists guests, devices, their state, and what they have done.
    List {
        /// As JSON, with every counter.
        #[arg(long)]
        json: bool,
    },
    /// Runs a block device for a simulated guest, on this machine, without Xen.
    Demo(demo::Options),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(output) => {
            // A reader that has seen enough, like `head`, is no error.
            let _ = std::io::stdout().write_all(output.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<String> {
    match command {
        Command::List { json } => {
            let report = control::list(control::SOCKET_PATH.as_ref())?;
            Ok(if json {
                serde_json::to_string_pretty(&report)? + "\n"
            } else {
                report.to_string()
            })
        }
        Command::Demo(options) => demo::run(&options),
    }
}
