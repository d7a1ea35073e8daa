//! `stand-in SOCKET IMAGE MANNER`: serves a disk at a socket, in that manner, until it is killed. `stand-in manners` prints
//! them all.

use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::os::unix::net::UnixListener;
use xen_virtio_stand_in::{MANNERS, Manner, serve};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["manners"] => {
            for (name, _) in MANNERS {
                println!("{name}");
            }
            Ok(())
        }
        [socket, image, manner] => {
            let manner = Manner::named(manner).with_context(|| format!("no manner {manner}"))?;
            let image = OpenOptions::new().read(true).write(true).open(image)?;
            serve(&UnixListener::bind(socket)?, &image, manner);
            Ok(())
        }
        _ => bail!("usage: stand-in SOCKET IMAGE MANNER | stand-in manners"),
    }
}
