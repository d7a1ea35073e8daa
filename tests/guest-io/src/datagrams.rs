//! Questions and answers by UDP.

use anyhow::{Result, bail, ensure};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

/// Datagrams of a question each, from one byte to what an Ethernet frame takes.
const SIZES: [usize; 5] = [1, 64, 512, 1400, 1472];
/// A datagram may be lost: as many are sent, one each time that nothing has come for so long.
const TRIES: usize = 10;
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks whoever answers at `address`, and has each question back with its bytes turned.
pub(crate) fn ask(address: &str) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    for size in SIZES {
        let question: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
        let answer = answer_to(&socket, &question)?;
        ensure!(
            answer == turned(&question),
            "a wrong answer to {size} bytes"
        );
    }
    println!("datagrams: {} questions answered", SIZES.len());
    Ok(())
}

/// What comes back for `question`, but for late answers to those before it, which were shorter.
fn answer_to(socket: &UdpSocket, question: &[u8]) -> Result<Vec<u8>> {
    let mut answer = [0; 2048];
    for _ in 0..TRIES {
        socket.send(question)?;
        while let Ok(len) = socket.recv(&mut answer) {
            if len >= question.len() {
                return Ok(answer[..len].to_vec());
            }
        }
    }
    bail!("no answer to {} bytes", question.len())
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
