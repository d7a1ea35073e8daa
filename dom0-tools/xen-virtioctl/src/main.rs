//! Shows what `xen-virtiod` does, and tries the same devices on a simulated guest.

mod console;
mod demo;
mod metrics;
#[cfg(test)]
mod pages;
mod report;
mod top;

use anyhow::{Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use xen_virtio_dom0_tools::config::{CONFIG_PATH, Config};
use xen_virtio_dom0_tools::created::{self, Created};
use xen_virtio_dom0_tools::ctl::control::Order;
use xen_virtio_dom0_tools::ctl::inspect::Inspection;
use xen_virtio_dom0_tools::ctl::metrics::Format;
use xen_virtio_dom0_tools::ctl::stats::Stats;
use xen_virtio_dom0_tools::ctl::xl_config::Findings;
use xen_virtio_dom0_tools::ctl::{check, control, create, events, slots};
use xen_virtio_dom0_tools::doctor::{self, About};
use xen_virtio_dom0_tools::toolstack::guest_file;

/// Shows the virtio devices of this host's Xen guests.
#[derive(Parser)]
#[command(name = "xen-virtioctl", version)]
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
    /// Shows what a request costs: traps, interrupts, copies, time. `list --json` has the bare counters.
    Stats,
    /// Shows, live, what the devices of all guests do: requests, bytes, times, traps and interrupts a request, pages, workers. Keys: q
    /// leaves, s orders, / filters, Enter shows one device.
    Top {
        /// Seconds between two looks.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
        period: u64,
    },
    /// Looks on for a while, and writes a page about the service for somebody else to read: devices, what they do, how long requests
    /// take, what is wrong and what to do.
    Report {
        /// The page, in place of text.
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// How long to look on.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
        seconds: u64,
    },
    /// Tells a monitoring system of guests and devices: prints it, or answers at a socket.
    Metrics {
        /// What is printed; at a socket, whoever asks says that.
        #[arg(long, value_enum, default_value_t = MetricsFormat::Openmetrics, conflicts_with = "listen")]
        format: MetricsFormat,
        /// Answer GET /metrics here until this is ended: a path for a Unix socket, or a loopback address like 127.0.0.1:9809.
        #[arg(long)]
        listen: Option<String>,
    },
    /// Shows all that is known of one device: registers, features, queues, what is under way, counts, times, what is wrong.
    Inspect {
        /// The guest's name or domid.
        guest: String,
        /// The device, as `list` names it, like virtio_disk/51712.
        device: String,
    },
    /// Checks the service's configuration, and the virtio devices of an xl file: to be run before `xl create`.
    /// Warnings alone leave its exit status 0.
    Check {
        /// The service's configuration, in place of /etc/xen-virtiod/config.toml, which may be missing.
        #[arg(long)]
        config: Option<PathBuf>,
        /// The guest's xl file.
        file: Option<PathBuf>,
    },
    /// Looks at Xen, dom0, the service and the guests: says of what is wrong why it matters and what to do. Its exit status is 0
    /// if all is fine, 3 if there are warnings and no more, 4 if there is a fault.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// A guest, by its name or domid, or the xl file of one that may not be there yet: all guests without it.
        about: Option<String>,
    },
    /// Has xl create a guest with the devices of its xen_virtio = [ … ], and lets it run when they are there.
    Create {
        /// How long it may take until they are, in seconds.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=LONGEST))]
        timeout: u64,
        /// The guest's xl file.
        file: PathBuf,
        /// Options for xl create.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// Waits until all devices of a guest are served.
    Wait {
        /// How long it may take, in seconds.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=LONGEST))]
        timeout: u64,
        /// The guest's name or domid.
        guest: String,
    },
    /// Prints the source of the partial device tree with which a guest finds the devices of its file in
    /// /etc/xen-virtiod/guests: for device_tree= in its xl file, after dtc.
    DeviceTree {
        /// The guest's name.
        guest: String,
    },
    /// Gives a guest a device while it runs, in a slot that it was created with: xen_virtio = [ "empty" ].
    Attach {
        /// The guest's name or domid.
        guest: String,
        /// The device, as a line of xen_virtio = [ … ] has it: "blk, path=/dev/vg/data".
        device: String,
        /// The slot, as `list` names it, like virtio/1: the first empty one without it.
        #[arg(long)]
        slot: Option<String>,
        /// How long it may take until the device is served, in seconds.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=LONGEST))]
        timeout: u64,
    },
    /// Takes such a device away again.
    Detach {
        /// The guest's name or domid.
        guest: String,
        /// The device, as `list` names it, like virtio_attached/0.
        device: String,
        /// Though a driver has it: what that has asked for never ends.
        #[arg(long)]
        force: bool,
        /// How long its transfers may take to end, in seconds.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=LONGEST))]
        timeout: u64,
    },
    /// Tells a guest of what was added to one of its disks, which has been enlarged.
    Resize {
        /// The guest's name or domid.
        guest: String,
        /// The disk: its vdev, like xvda, or what `list` names it, like virtio_disk/51712.
        device: String,
    },
    /// Plugs the cable of a guest's network interface in or out.
    Link {
        /// The guest's name or domid.
        guest: String,
        /// The interface, as `list` names it, like virtio/0.
        device: String,
        state: LinkState,
    },
    /// Shows a guest's console, and types to it: Ctrl-] leaves. What the guest has written before is shown first, 256 KiB at most.
    Console {
        /// The guest's name or domid.
        guest: String,
        /// The port: its number, or the name of a channel.
        #[arg(default_value = "0")]
        port: String,
        /// The console, as `list` names it, like virtio/0: where the guest has several.
        #[arg(long)]
        device: Option<String>,
    },
    /// Has a guest's input device say something: KEY_A is pressed and let go, KEY_A=1 pressed, ABS_X=100+ABS_Y=50 happens at once.
    Input {
        /// The guest's name or domid.
        guest: String,
        /// The events, by their names in linux/input-event-codes.h.
        #[arg(required = true)]
        events: Vec<String>,
        /// The device, as `list` names it, like virtio/0: where the guest has several.
        #[arg(long)]
        device: Option<String>,
    },
    /// Runs a block device for a simulated guest, on this machine, without Xen.
    Demo(demo::Options),
}

/// Seconds that anything may be waited for: a day.
const LONGEST: u64 = 86_400;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MetricsFormat {
    Openmetrics,
    Prometheus,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkState {
    Up,
    Down,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok((output, status)) => {
            // A reader that has seen enough, like `head`, is no error.
            let _ = std::io::stdout().write_all(output.as_bytes());
            status
        }
        Err(error) => {
            say(&format!("error: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}

/// A closed standard error is no reason to fail otherwise.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What is printed, and the exit status.
fn run(command: Command) -> Result<(String, ExitCode)> {
    let mut status = ExitCode::SUCCESS;
    let output = match command {
        Command::List { json } => {
            let report = control::list(control::SOCKET_PATH.as_ref())?;
            Ok(if json {
                serde_json::to_string_pretty(&report)? + "\n"
            } else {
                report.to_string()
            })
        }
        Command::Stats => {
            let report = control::list(control::SOCKET_PATH.as_ref())?;
            Ok(Stats(&report).to_string())
        }
        Command::Top { period } => top::run(Duration::from_secs(period)),
        Command::Report { html, seconds } => report::run(html.as_deref(), seconds),
        Command::Metrics { format, listen } => match listen {
            Some(address) => metrics::serve(&address),
            None => metrics::show(match format {
                MetricsFormat::Openmetrics => Format::OpenMetrics,
                MetricsFormat::Prometheus => Format::Prometheus,
            }),
        },
        Command::Inspect { guest, device } => {
            let report = control::list(control::SOCKET_PATH.as_ref())?;
            Ok(Inspection::of(&report, &guest, &device)?.to_string())
        }
        Command::Check { config, file } => {
            let path = config.as_deref().unwrap_or(CONFIG_PATH.as_ref());
            let config = match &config {
                Some(path) => Config::load(path)?,
                None => Config::load_default()?,
            };
            match file {
                None => Ok(config_summary(path, &config) + &check_guest_files()?),
                Some(file) => shown(check::xl_file(&file, &config, &check::guest_files())?),
            }
        }
        Command::Doctor { json, about } => {
            let diagnosis = doctor::diagnose(About::new(about.as_deref()))?;
            status = diagnosis.exit_status().into();
            Ok(if json {
                serde_json::to_string_pretty(&diagnosis)? + "\n"
            } else {
                diagnosis.to_string()
            })
        }
        Command::Create {
            timeout,
            file,
            options,
        } => {
            let created = Created::new(created::DIRECTORY.as_ref());
            let config = Config::load_default()?;
            let limit = Duration::from_secs(timeout);
            create::create(&file, &options, &config, &created, limit)
        }
        Command::Wait { timeout, guest } => create::wait(&guest, 1, Duration::from_secs(timeout)),
        Command::DeviceTree { guest } => {
            let devices = check::guest_files().devices(&guest)?;
            ensure!(
                !devices.is_empty(),
                "{}/{guest}.toml is not there, or has no [[device]]",
                guest_file::DIRECTORY
            );
            Ok(guest_file::device_tree(&guest, &devices))
        }
        Command::Attach {
            guest,
            device,
            slot,
            timeout,
        } => {
            let (path, limit) = (control::SOCKET_PATH.as_ref(), Duration::from_secs(timeout));
            slots::attach(path, &guest, slot, device, limit)
        }
        Command::Detach {
            guest,
            device,
            force,
            timeout,
        } => {
            let (path, limit) = (control::SOCKET_PATH.as_ref(), Duration::from_secs(timeout));
            slots::detach(path, &guest, &device, force, limit)
        }
        Command::Resize { guest, device } => change(guest, device, Order::Resize),
        Command::Link {
            guest,
            device,
            state,
        } => {
            let is_up = state == LinkState::Up;
            change(guest, device, Order::Link { is_up })
        }
        Command::Console {
            guest,
            port,
            device,
        } => {
            console::attach(&console::Wanted {
                guest: &guest,
                device: device.as_deref(),
                port: &port,
            })?;
            Ok(String::new())
        }
        Command::Input {
            guest,
            device,
            events,
        } => {
            let events = events::parse(&events)?;
            change(guest, device, Order::Input { events })
        }
        Command::Demo(options) => demo::run(&options),
    };
    Ok((output?, status))
}

fn change(guest: String, device: impl Into<Option<String>>, order: Order) -> Result<String> {
    let (path, device) = (control::SOCKET_PATH.as_ref(), device.into());
    Ok(control::change(path, guest, device, order)? + "\n")
}

fn config_summary(path: &Path, config: &Config) -> String {
    let missing = if path.exists() {
        ""
    } else {
        " is not there; the defaults"
    };
    format!(
        "{}{missing}: [[virtio]] {} times, polling.limit-us = {}, limits.cpu-percent = {}\n",
        path.display(),
        config.devices.len(),
        config.polling.limit_us,
        config.limits.cpu_percent,
    )
}

/// A line for each device of each guest that has a file.
fn check_guest_files() -> Result<String> {
    let files = check::guest_files();
    let mut text = String::new();
    for name in files.names() {
        text += &shown(check::guest_file(&files, &name)?)?;
    }
    for other in files.strangers() {
        say(&format!(
            "warning: {}/{other} is no file of a guest's: its name does not end in .toml\n",
            guest_file::DIRECTORY
        ));
    }
    Ok(text)
}

/// What is good, where nothing is wrong.
fn shown(findings: Findings) -> Result<String> {
    // A warning is for who reads it, and leaves the exit status as it is.
    for warning in &findings.warnings {
        say(&format!("warning: {warning}\n"));
    }
    let good: String = findings.good.into_iter().map(|line| line + "\n").collect();
    if findings.problems.is_empty() {
        return Ok(good);
    }
    // What is good is said as well, but not what a script would take for success.
    say(&good);
    bail!("{}", findings.problems.join("\nerror: "))
}
