//! Any answers of xenstored, to what is asked for a device: lines are values; an empty one is a node that is
//! not there. The other half of the inputs are bytes on the wire.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use xen_virtio_dom0_tools::toolstack::guest_file::GuestFiles;
use xen_virtio_dom0_tools::toolstack::libxl::{self, EntryForm, EntryKey};
use xen_virtio_dom0_tools::toolstack::xenstore::XenStore;
use xen_virtio_dom0_tools::toolstack::{Toolstack, XenDomains, XenToolstack};
// For what the linker wants to find in it.
use xen_virtio_fuzz as _;

/// `XS_READ` and `XS_ERROR` (`xen/io/xs_wire.h`).
const READ: u32 = 2;
const ERROR: u32 = 16;
/// Answers in one input; a header alone has 16 bytes.
const ANSWERS: usize = 128;

fn message(kind: u32, request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short payload");
    let header = [kind, request, 0, len].map(u32::to_ne_bytes).concat();
    [header, payload.to_vec()].concat()
}

fuzz_target!(|input: &[u8]| {
    let Some((first, rest)) = input.split_first() else {
        return;
    };
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    // Nobody takes the requests out of the socket: as many answers at most as it has room for requests.
    let rest = &rest[..rest.len().min(16 * ANSWERS)];
    let answers = if first & 1 == 0 {
        let lines = rest.split(|byte| *byte == b'\n').take(ANSWERS).zip(1..);
        lines
            .flat_map(|(line, request)| match line {
                b"" => message(ERROR, request, b"ENOENT\0"),
                line => message(READ, request, line),
            })
            .collect()
    } else {
        rest.to_vec()
    };
    // At once: a socket has little room for many small messages.
    theirs.write_all(&answers).expect("room in a socket");
    theirs
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket");
    let store = XenStore::over(File::from(OwnedFd::from(ours)));
    let mut toolstack = XenToolstack::new(
        store,
        GuestFiles::new(Path::new("/nonexistent")),
        Box::new(XenDomains),
    );
    let form = if first & 2 == 0 {
        EntryForm::Disk
    } else {
        EntryForm::Virtio
    };
    let key = EntryKey { form, devid: 51712 };
    match first >> 2 & 3 {
        0 => drop(toolstack.device(3, key)),
        1 => drop(toolstack.sweep()),
        2 => drop(toolstack.next_event()),
        _ => drop(toolstack.active_devices(3)),
    }
    if let Ok(text) = std::str::from_utf8(rest) {
        let _ = libxl::parse_path(text);
    }
});
