//! Questions and answers by UDP.

use anyhow::{Result, ensure};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

/// Datagrams of a question each, from one byte to what an Ethernet frame takes.
const SIZES: [usize; 5] = [1, 64, 512, 1400, 1472];
const LIMIT: Duration = Duration::from_secs(3);

/// Asks whoever answers at `address`, and has each question back with its bytes turned.
pub(crate) fn ask(address: &str) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.connect(address)?;
    for size in SIZES {
        let question: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
        socket.send(&question)?;
        let mut answer = [0; 2048];
        let len = socket.recv(&mut answer)?;
        ensure!(
            answer[..len] == turned(&question)[..],
            "a wrong answer to {size} bytes"
        );
    }
    println!("datagrams: {} questions answered", SIZES.len());
    Ok(())
}

/// Answers all questions at `port`.
pub(crate) fn answer(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    loop {
        let mut question = [0; 2048];
        let (len, from) = socket.recv_from(&mut question)?;
        socket.send_to(&turned(&question[..len]), from)?;
    }
}

fn turned(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}
