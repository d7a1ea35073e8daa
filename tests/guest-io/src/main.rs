//! What a guest on the board does to its disks: measures them, and verifies them under random writes.

mod bench;
mod chi_square;
mod datagrams;
// Asks a chip for a line.
#[allow(unsafe_code)]
mod edges;
mod endure;
mod grants;
mod hung;
mod peer;
// Makes a device of uinput.
#[allow(unsafe_code)]
mod input;
mod registers;
// Hands memory to the kernel for as long as a transfer takes.
#[allow(unsafe_code)]
mod ring;
mod stream;
mod trips;
mod verify;
mod xattr;
mod zero;

use anyhow::{Context, Result, bail};
use std::path::Path;
use xen_virtio_guest_io::board::BoardDevice;
use xen_virtio_guest_io::{Driver, framing, malformed, missteps};

const USAGE: &str = "usage: guest-io bench DEVICE PATTERN SECONDS | guest-io verify DEVICE SECONDS | guest-io grants \
                     | guest-io registers BASE COUNT SEED | guest-io malformed BASE | guest-io misstep BASE NAME | guest-io hung BASE \
                     | guest-io chi-square SOURCE BYTES | guest-io zero DEVICE BYTES | guest-io endure BASE \
                     | guest-io xattr FILE NAME [VALUE] | guest-io send ADDRESS MIB | guest-io receive ADDRESS \
                     | guest-io ask ADDRESS | guest-io answer PORT | guest-io edges CHIP LINE COUNT \
                     | guest-io echo PORT | guest-io trips ADDRESS SECONDS \
                     | guest-io framing BASE | guest-io peer TAP \
                     | guest-io type | guest-io events DEVICE COUNT";

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
        ["registers", base, count, seed] => registers::run(
            address(base)?,
            count.parse().context(USAGE)?,
            seed.parse().context(USAGE)?,
        ),
        ["malformed", base] => {
            let driver = Driver::new(BoardDevice::open(address(base)?)?);
            println!(
                "malformed: {} kinds, each ended as listed",
                malformed::do_all(&driver)?
            );
            Ok(())
        }
        ["misstep", base, name] => {
            missteps::make(&Driver::new(BoardDevice::open(address(base)?)?), name)
        }
        ["endure", base] => endure::run(&Driver::new(BoardDevice::open(address(base)?)?)),
        ["xattr", file, name] => xattr::run(file, name, None),
        ["xattr", file, name, value] => xattr::run(file, name, Some(value)),
        ["send", address, mib] => stream::send(address, mib.parse().context(USAGE)?),
        ["receive", address] => stream::receive(address),
        ["ask", address] => datagrams::ask(address),
        ["answer", port] => datagrams::answer(port.parse().context(USAGE)?),
        ["edges", chip, line, count] => edges::wait_for(
            Path::new(chip),
            line.parse().context(USAGE)?,
            count.parse().context(USAGE)?,
        ),
        ["echo", port] => trips::echo(port.parse().context(USAGE)?),
        ["trips", address, seconds] => trips::count(address, seconds.parse().context(USAGE)?),
        ["framing", base] => {
            let driver = Driver::new(BoardDevice::open(address(base)?)?);
            for line in framing::check_all(&driver)? {
                println!("framing: {line}");
            }
            Ok(())
        }
        ["peer", tap] => peer::serve(tap),
        ["type"] => input::type_lines(),
        ["events", device, count] => {
            input::wait_for(Path::new(device), count.parse().context(USAGE)?)
        }
        ["hung", base] => hung::run(&Driver::new(BoardDevice::open(address(base)?)?)),
        ["zero", device, count] => zero::run(Path::new(device), count.parse().context(USAGE)?),
        ["chi-square", source, count] => {
            chi_square::run(Path::new(source), count.parse().context(USAGE)?)
        }
        _ => bail!(USAGE),
    }
}

fn address(text: &str) -> Result<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).context(USAGE)
}
