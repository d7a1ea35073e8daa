//! How often a byte goes to the other side and back in a second, by TCP.

use anyhow::{Result, ensure};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Sends each byte back to whoever sends it.
pub(crate) fn echo(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut byte = [0];
        while stream.read(&mut byte).is_ok_and(|len| len == 1) {
            stream.write_all(&byte)?;
        }
    }
}

/// For so long, with whoever [echoes](echo) at `address`.
pub(crate) fn count(address: &str, seconds: f64) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let limit = Duration::try_from_secs_f64(seconds)?;
    let began = Instant::now();
    let mut trips = 0u32;
    while began.elapsed() < limit {
        let sent = [trips.to_le_bytes()[0]];
        stream.write_all(&sent)?;
        let mut back = [0];
        stream.read_exact(&mut back)?;
        ensure!(back == sent, "another byte came back");
        trips += 1;
    }
    let rate = f64::from(trips) / began.elapsed().as_secs_f64();
    println!("round trips: {rate:.0} a second");
    Ok(())
}
