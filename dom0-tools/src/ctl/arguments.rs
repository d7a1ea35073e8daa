//! The command line of `xen-virtioctl`, which its manual page and completions are made from too.

use clap::{Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Shows the virtio devices of this host's Xen guests.
#[derive(Parser)]
#[command(name = "xen-virtioctl", version)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

/// What it is to do.
#[derive(Subcommand)]
pub enum Command {
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
    /// Shows each request of a device as its driver gets it back, until Ctrl-C: how long it was with the device, its queue, what it
    /// asked for. What comes faster than it is read is counted.
    Trace {
        /// The guest's name or domid.
        guest: String,
        /// The device, as `list` names it, like virtio_disk/51712.
        device: String,
        /// Those of this queue alone.
        #[arg(long)]
        queue: Option<usize>,
        /// A disk's requests of this kind alone.
        #[arg(long, value_parser = ["read", "write", "flush", "discard", "write-zeroes", "get-id", "refused"])]
        what: Option<String>,
        /// Those alone that took at least so many microseconds.
        #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
        slower_than: u64,
        /// Those alone whose driver was told of an error, of a disk's.
        #[arg(long)]
        failed: bool,
        /// End after so many.
        #[arg(long)]
        count: Option<u64>,
        /// A line of JSON each.
        #[arg(long)]
        json: bool,
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
    /// Has xl create a guest, also with the devices of its xen_virtio = [ … ] or of its own file, and lets it run when they are
    /// there. A guest without virtio devices is created as by xl.
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
    Demo(DemoOptions),
}

/// Seconds that anything may be waited for: a day.
const LONGEST: u64 = 86_400;

/// What `metrics` prints.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MetricsFormat {
    Openmetrics,
    Prometheus,
}

/// Of a network interface.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LinkState {
    Up,
    Down,
}

/// Of `demo`.
#[derive(clap::Args)]
pub struct DemoOptions {
    /// A raw file or block device to use as the disk; its beginning is overwritten. A temporary file of 16
    /// MiB by default.
    #[arg(long)]
    pub disk: Option<PathBuf>,
    /// Use guest-physical addresses instead of grants.
    #[arg(long)]
    pub no_grants: bool,
}
