//! What a guest on the board does to its disks: measures them, and verifies them under random writes.

mod bench;
mod ring;
mod verify;

use anyhow::{Context, Result, bail};
use std::path::Path;

const USAGE: &str = "usage: guest-io bench DEVICE SECONDS | guest-io verify DEVICE SECONDS";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, device, seconds] = &arguments[..] else {
        bail!(USAGE)
    };
    let seconds: u64 = seconds.parse().context(USAGE)?;
    match &**what {
        "bench" => bench::run(Path::new(device), seconds),
        "verify" => verify::run(Path::new(device), seconds),
        _ => bail!(USAGE),
    }
}
