//! Shows what `xen-virtiod` does, and tries the same devices on a simulated guest.

mod console;
mod demo;
mod metrics;
#[cfg(test)]
mod pages;
mod patience;
mod report;
mod top;
mod trace;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use xen_virtio_dom0_tools::config::{CONFIG_PATH, Config};
use xen_virtio_dom0_tools::created::{self, Created};
use xen_virtio_dom0_tools::ctl::arguments::{Arguments, Command, LinkState, MetricsFormat};
use xen_virtio_dom0_tools::ctl::control::Order;
use xen_virtio_dom0_tools::ctl::inspect::Inspection;
use xen_virtio_dom0_tools::ctl::metrics::Format;
use xen_virtio_dom0_tools::ctl::stats::Stats;
use xen_virtio_dom0_tools::ctl::trace::Filter;
use xen_virtio_dom0_tools::ctl::xl_config::Findings;
use xen_virtio_dom0_tools::ctl::{check, control, create, events, slots};
use xen_virtio_dom0_tools::doctor::{self, About};
use xen_virtio_dom0_tools::toolstack::guest_file;

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
        Command::Trace {
            guest,
            device,
            queue,
            what,
            slower_than,
            failed,
            count,
            json,
        } => {
            let filter = Filter {
                queue,
                what,
                slower_than: Duration::from_micros(slower_than),
                failed,
            };
            let wanted = trace::Wanted {
                guest,
                device,
                filter,
                count,
                json,
            };
            trace::run(&wanted)?;
            Ok(String::new())
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
