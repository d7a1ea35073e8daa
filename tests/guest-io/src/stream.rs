//! Streams of known bytes over sockets of any kind.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;
use xen_virtio_guest_io::Random;

const CHUNK: usize = 64 << 10;
/// `VMADDR_CID_ANY` (`linux/vm_sockets.h`).
const ANY_CID: u32 = u32::MAX;

/// A stream, of one of these:
///
/// - `tcp:HOST:PORT`, `tcp-listen:PORT`
/// - `unix:PATH`, `unix-listen:PATH`
/// - `unix-connect:PATH:PORT`: asks who listens there to connect to a guest's port, as Firecracker has it
/// - `vsock:CID:PORT`, `vsock-listen:PORT`
fn open(address: &str) -> Result<File> {
    let (kind, rest) = address.split_once(':').context("no kind of address")?;
    let file = |fd: OwnedFd| File::from(fd);
    Ok(match kind {
        "tcp" => file(TcpStream::connect(rest)?.into()),
        "tcp-listen" => {
            let listener = TcpListener::bind(("0.0.0.0", rest.parse()?))?;
            println!("stream: listens");
            file(listener.accept()?.0.into())
        }
        "unix" => file(UnixStream::connect(rest)?.into()),
        "unix-listen" => {
            let listener = UnixListener::bind(rest)?;
            println!("stream: listens");
            file(listener.accept()?.0.into())
        }
        "unix-connect" => {
            let (path, port) = rest.rsplit_once(':').context("no port")?;
            let mut stream = UnixStream::connect(path)?;
            // In one piece: some back-ends read it once.
            stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
            let mut answer = Vec::new();
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
                answer.push(byte[0]);
            }
            ensure!(
                answer.starts_with(b"OK "),
                "{}",
                String::from_utf8_lossy(&answer)
            );
            file(stream.into())
        }
        "vsock" => {
            let (cid, port) = rest.split_once(':').context("no port")?;
            let fd = vsock()?;
            connect(fd.as_raw_fd(), &VsockAddr::new(cid.parse()?, port.parse()?))?;
            file(fd)
        }
        "vsock-listen" => {
            let fd = vsock()?;
            bind(fd.as_raw_fd(), &VsockAddr::new(ANY_CID, rest.parse()?))?;
            listen(&fd, Backlog::new(1)?)?;
            println!("stream: listens");
            file(rustix::net::accept(&fd)?)
        }
        _ => bail!("{address} is no address"),
    })
}

fn vsock() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}

/// Sends so many MiB of known bytes.
pub(crate) fn send(address: &str, mib: usize) -> Result<()> {
    let mut stream = open(address)?;
    let mut random = Random(1);
    let mut chunk = vec![0; CHUNK];
    let began = Instant::now();
    for _ in 0..mib << 20 >> 16 {
        fill(&mut chunk, &mut random);
        stream.write_all(&chunk)?;
    }
    println!(
        "stream: sent {mib} MiB in {} ms",
        began.elapsed().as_millis()
    );
    Ok(())
}

/// Receives them, to the end of the stream.
pub(crate) fn receive(address: &str) -> Result<()> {
    let mut stream = open(address)?;
    let mut random = Random(1);
    let (mut expected, mut chunk) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut total = 0;
    let began = Instant::now();
    loop {
        let mut len = 0;
        while len < CHUNK {
            match stream.read(&mut chunk[len..])? {
                0 => break,
                more => len += more,
            }
        }
        if len == 0 {
            break;
        }
        fill(&mut expected, &mut random);
        ensure!(
            chunk[..len] == expected[..len],
            "wrong bytes from {total} on"
        );
        total += len;
    }
    println!(
        "stream: received {} MiB as sent, in {} ms",
        total >> 20,
        began.elapsed().as_millis()
    );
    Ok(())
}

fn fill(chunk: &mut [u8], random: &mut Random) {
    for word in chunk.chunks_exact_mut(8) {
        word.copy_from_slice(&random.number().to_le_bytes());
    }
}
