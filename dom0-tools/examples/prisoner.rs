//! Tries, as a worker in its sandbox, what a worker must not be able to do: for the board's case `prison`.
//!
//! `prisoner DOMID OTHER ACTION`: a worker of guest DOMID. It is killed, or says `refused`; it must not say
//! `done`.

use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::rc::Rc;
use vm_memory::VolatileSlice;
use xen_virtio_dom0_tools::sandbox;
use xen_virtio_guest_mapping::xen::{Domid, FrameAccess, Privcmd};
use xen_virtio_guest_mapping::{CopyOp, Direction, GuestAccess, GuestAddress};
use xen_virtio_transport::xen::XenGuest;

/// Where an Arm guest's memory begins (`GUEST_RAM0_BASE`).
const GUEST_MEMORY: GuestAddress = GuestAddress(0x4000_0000);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [domid, other, action] = &arguments[..] else {
        bail!("usage: prisoner DOMID OTHER ACTION")
    };
    let (domid, other): (u16, u16) = (domid.parse()?, other.parse()?);
    let privcmd = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/xen/privcmd")?;
    Privcmd::restrict(&privcmd, Domid(domid))?;
    sandbox::enter(domid)?;
    match attempt(action, privcmd, domid, other) {
        Ok(()) => println!("done"),
        Err(error) => println!("refused: {error:#}"),
    }
    Ok(())
}

fn attempt(action: &str, privcmd: File, domid: u16, other: u16) -> Result<()> {
    match action {
        // What a worker does, to see that the others fail for the right reason.
        "map-own" => read_guest(privcmd, domid)?,
        "map-other" => read_guest(privcmd, other)?,
        "serve-other" => {
            XenGuest::create_server(&Privcmd::new(privcmd, Domid(other)))?;
        }
        "open" => drop(File::open("/")?),
        "create" => drop(File::create("/file")?),
        "tcp" => drop(TcpListener::bind("127.0.0.1:0")?),
        "udp" => drop(UdpSocket::bind("127.0.0.1:0")?),
        "unix" => drop(UnixDatagram::unbound()?),
        "signal" => nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None)?,
        "exec" => drop(Command::new("/bin/sh").spawn()?),
        "root" => nix::unistd::setuid(nix::unistd::Uid::from_raw(0))?,
        other => bail!("no action {other}"),
    }
    Ok(())
}

fn read_guest(privcmd: File, domid: u16) -> Result<()> {
    let mut access = FrameAccess::new(Rc::new(Privcmd::new(privcmd, Domid(domid))), Rc::default());
    let mut bytes = [0; 64];
    let mut operations = [CopyOp::new(Direction::FromGuest, GUEST_MEMORY, 0..64)];
    access.copy(&VolatileSlice::from(&mut bytes[..]), &mut operations);
    operations[0].result.context("reading the guest's memory")
}
