//! What a guest on the board does to its disks: measures them, and verifies them under random writes.

mod bench;
mod grants;
mod ring;
mod verify;

use anyhow::{Context, Result, bail};
use std::path::Path;

const USAGE: &str = "usage: guest-io bench DEVICE PATTERN SECONDS | guest-io verify DEVICE SECONDS | guest-io grants";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["bench", device, pattern, seconds] => {
            bench::run(Path::new(device), pattern, seconds.parse().context(USAGE)?)
        }
        ["verify", device, seconds] => {
            verify::run(Path::new(device), seconds.parse().context(USAGE)?)
        }
        ["grants"] => grants::run(),
        _ => bail!(USAGE),
    }
}
