//! Writes the manual pages and the shells' completions of both programs, from the definitions that they parse their command
//! lines by: `cargo run --package xen-virtio-dom0-tools --example manuals -- DIRECTORY`.

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::path::{Path, PathBuf};
use xen_virtio_dom0_tools::config::CONFIG_PATH;
use xen_virtio_dom0_tools::created;
use xen_virtio_dom0_tools::ctl::control::SOCKET_PATH;
use xen_virtio_dom0_tools::log::LEVEL_VARIABLE;
use xen_virtio_dom0_tools::toolstack::guest_file;

/// Programs of the administrator.
const SECTION: &str = "8";

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1);
    let directory = PathBuf::from(directory.context("usage: manuals DIRECTORY")?);
    for (command, more) in [
        (
            xen_virtio_dom0_tools::arguments::Arguments::command(),
            &about_the_service()[..],
        ),
        (
            xen_virtio_dom0_tools::ctl::arguments::Arguments::command(),
            SEE_THE_SERVICE,
        ),
    ] {
        write(&directory, command, more).with_context(|| directory.display().to_string())?;
    }
    Ok(())
}

/// Those of one program; `more` stands at the end of its page.
fn write(directory: &Path, command: Command, more: &str) -> Result<()> {
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), &name, &completions)?;
    }
    // `help` says again what the pages say. The pages' names are given by building.
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let manuals = directory.join("man");
    fs::create_dir_all(&manuals)?;
    page(&manuals, &command, more)?;
    for subcommand in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        page(&manuals, subcommand, "")?;
    }
    Ok(())
}

/// The page of `command`, with `more` at its end.
fn page(directory: &Path, command: &Command, more: &str) -> Result<()> {
    let page = Man::new(command.clone())
        .section(SECTION)
        .manual("xen-virtio");
    let mut text = Vec::new();
    page.render(&mut text)?;
    text.extend_from_slice(more.as_bytes());
    Ok(fs::write(directory.join(page.get_filename()), text)?)
}

const SEE_THE_SERVICE: &str = ".SH \"SEE ALSO\"\n.BR xen\\-virtiod (8),\n.BR xl (1)\n";

fn about_the_service() -> String {
    let entry = |term: &str, text: &str| {
        format!(
            ".TP\n.B {}\n{}\n",
            term.replace('-', "\\-"),
            text.replace('-', "\\-")
        )
    };
    let mut text = ".SH ENVIRONMENT\n".to_owned();
    text += &entry(
        LEVEL_VARIABLE,
        "What is logged to standard error: error, warn, info (the default), debug, trace.",
    );
    text += ".SH FILES\n";
    for (path, what) in [
        (CONFIG_PATH, "The service's configuration, if it is there."),
        (
            guest_file::DIRECTORY,
            "The devices of guests that no xl describes, NAME.toml for each.",
        ),
        (SOCKET_PATH, "Where xen-virtioctl asks."),
        (
            created::DIRECTORY,
            "What xen-virtioctl create has said of guests.",
        ),
    ] {
        text += &entry(path, what);
    }
    text + ".SH \"SEE ALSO\"\n.BR xen\\-virtioctl (8),\n.BR xl.cfg (5)\n"
}
