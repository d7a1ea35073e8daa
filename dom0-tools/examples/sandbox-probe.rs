//! Tries, as a worker in its sandbox, what a worker must not be able to do: for the board's case `prison`.
//!
//! `sandbox-probe DOMID OTHER ACTION`: a worker of guest DOMID. It is killed, or says `refused` and why, or `done`
//! and what it has read.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail};
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::rc::Rc;
use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_backend::RingStock;
use xen_virtio_dom0_tools::worker::sandbox;
use xen_virtio_guest_mapping::xen::{Domid, FrameAccess, GrantAccess, Privcmd};
use xen_virtio_guest_mapping::{
    BusAddress, CopyOp, Direction, Gref, GuestAccess, GuestAddress, PAGE_SIZE, Page, Permissions,
};
use xen_virtio_transport::xen::XenGuest;

/// Where an Arm guest's memory begins (`GUEST_RAM0_BASE`).
const GUEST_MEMORY: GuestAddress = GuestAddress(0x4000_0000);

/// `GNTTAB_RESERVED_CONSOLE` and `GNTTAB_RESERVED_XENSTORE` (`xen/grant_table.h`): libxl grants these two pages
/// of each guest to dom0.
const CONSOLE: Gref = Gref(0);
const XENSTORE: Gref = Gref(1);

/// The only file that a ring knows.
const PROGRAM: types::Fixed = types::Fixed(0);

/// What a worker has.
struct Belongings {
    privcmd: File,
    gntdev: File,
    rings: RingStock,
    /// A file, as a worker has a disk.
    program: File,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [domid, other, action] = &arguments[..] else {
        bail!("usage: sandbox-probe DOMID OTHER ACTION")
    };
    let (domid, other): (u16, u16) = (domid.parse()?, other.parse()?);
    let open = |path| OpenOptions::new().read(true).write(true).open(path);
    let privcmd = open("/dev/xen/privcmd")?;
    Privcmd::restrict(&privcmd, Domid(domid))?;
    let gntdev = open("/dev/xen/gntdev")?;
    let program = File::open("/proc/self/exe")?;
    let rings = sandbox::enter(domid, || RingStock::new(1))?;
    let belongings = Belongings {
        privcmd,
        gntdev,
        rings,
        program,
    };
    match attempt(action, belongings, domid, other) {
        Ok(read) if read.is_empty() => println!("done"),
        Ok(read) => println!("done: {read}"),
        Err(error) => println!("refused: {error:#}"),
    }
    Ok(())
}

/// What was read, if anything was.
fn attempt(action: &str, has: Belongings, domid: u16, other: u16) -> Result<String> {
    let privcmd = has.privcmd;
    match action {
        // What a worker does, to see that the others fail for the right reason.
        "map-own" => read_guest(privcmd, domid)?,
        "ring-own" => submit(&has.rings, &has.program, |_| {
            opcode::Fsync::new(PROGRAM).build()
        })?,
        // What a worker can do, and need not.
        "console-other" => return read_grant(has.gntdev, other, CONSOLE),
        "xenstore-other" => return read_grant(has.gntdev, other, XENSTORE),
        "map-other" => read_guest(privcmd, other)?,
        "serve-other" => {
            XenGuest::create_server(&Privcmd::new(privcmd, Domid(other)))?;
        }
        "ring-new" => drop(IoUring::new(1)?),
        "ring-socket" => submit(&has.rings, &has.program, |_| {
            let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0);
            socket.build().flags(Flags::FIXED_FILE)
        })?,
        "ring-open" => submit(&has.rings, &has.program, |_| {
            let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr());
            open.build().flags(Flags::FIXED_FILE)
        })?,
        "ring-nop" => submit(&has.rings, &has.program, |_| {
            opcode::Nop::new().build().flags(Flags::FIXED_FILE)
        })?,
        "ring-descriptor" => submit(&has.rings, &has.program, |program| {
            opcode::Fsync::new(types::Fd(program.as_raw_fd())).build()
        })?,
        "ring-eventfd" => {
            let ring = has.rings.take().context("there is no ring")?;
            ring.submitter().register_eventfd(has.program.as_raw_fd())?;
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
    Ok(String::new())
}

/// Has a ring of the stock, which knows the program, carry out one entry.
fn submit(rings: &RingStock, program: &File, entry: impl Fn(&File) -> Entry) -> Result<()> {
    let mut ring = rings.take().context("there is no ring")?;
    ring.submitter().register_files(&[program.as_raw_fd()])?;
    // SAFETY: the entries use no memory but a path, which is a constant.
    unsafe { ring.submission().push(&entry(program)) }?;
    ring.submit_and_wait(1)?;
    let ended = ring.completion().next().context("nothing has ended")?;
    match ended.result() {
        0.. => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code).into()),
    }
}

/// The text in a page that guest `domid` has granted to dom0, mapped for writing too.
fn read_grant(gntdev: File, domid: u16, reference: Gref) -> Result<String> {
    let page = Page::Grant(reference);
    let address: GuestAddress = BusAddress { page, offset: 0 }.into();
    let mut access = GrantAccess::new(Rc::new(gntdev), Domid(domid));
    let mapped = access.map_ring(address, PAGE_SIZE, Permissions::ReadWrite)?;
    let mut bytes = [0_u8; PAGE_SIZE];
    mapped.read_slice(&mut bytes, address)?;
    let text = bytes.iter().map(|&byte| char::from(byte));
    Ok(text
        .filter(|letter| letter.is_ascii_graphic() || *letter == ' ')
        .collect())
}

fn read_guest(privcmd: File, domid: u16) -> Result<()> {
    let mut access = FrameAccess::new(Rc::new(Privcmd::new(privcmd, Domid(domid))), Rc::default());
    let mut bytes = [0; 64];
    let mut operations = [CopyOp::new(Direction::FromGuest, GUEST_MEMORY, 0..64)];
    access.copy(&VolatileSlice::from(&mut bytes[..]), &mut operations);
    operations[0].result.context("reading the guest's memory")
}
