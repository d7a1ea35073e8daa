//! systemd's journal, which takes fields beside the message: `JOURNAL_NATIVE_PROTOCOL`, systemd.io.

use super::{MAX_LINE, Record};
use rustix::fs::fstat;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with,
};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use tracing::Level;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Device and inode of the stream that systemd has given this process (systemd.exec(5)).
const STREAM_VARIABLE: &str = "JOURNAL_STREAM";

/// A way to journald, also to one that is started again.
#[derive(Debug)]
pub(super) struct Journal {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Journal {
    /// The one behind `fd`; `None` if that is no stream to a journal, or the journal does not answer.
    pub(super) fn behind(fd: BorrowedFd<'_>) -> Option<Self> {
        let stream = std::env::var(STREAM_VARIABLE).ok()?;
        let status = fstat(fd).ok()?;
        (stream == format!("{}:{}", status.st_dev, status.st_ino))
            .then(|| Self::at(SOCKET.as_ref()).ok())
            .flatten()
    }

    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
        let address = SocketAddrUnix::new(path)?;
        Ok(Self { socket, address })
    }

    /// True if it was taken.
    pub(super) fn send(&self, level: Level, record: &Record) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendto(&self.socket, &datagram(level, record), flags, &self.address).is_ok()
    }
}

/// The message with its fields. All are in the form that may have line breaks, so that no value is taken for a field.
fn datagram(level: Level, record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut field = |name: &str, value: &str| {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(b'\n');
        let value = &value.as_bytes()[..value.len().min(MAX_LINE)];
        bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        bytes.extend_from_slice(value);
        bytes.push(b'\n');
    };
    field("PRIORITY", priority(level));
    field("SYSLOG_IDENTIFIER", "xen-virtiod");
    for (name, value) in [
        ("XEN_GUEST", &record.guest),
        ("XEN_DOMID", &record.domid.map(|domid| domid.to_string())),
        ("XEN_DEVICE", &record.device),
    ] {
        if let Some(value) = value {
            field(name, value);
        }
    }
    field("MESSAGE", &record.text());
    bytes
}

/// syslog(3)'s.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn what_it_is_about_stands_in_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let record = Record {
            guest: Some("g\nPRIORITY=0".to_owned()),
            domid: Some(7),
            device: Some("virtio/0".to_owned()),
            message: "is slow".to_owned(),
        };
        assert!(Journal::at(&path).unwrap().send(Level::WARN, &record));
        let mut bytes = [0; 1000];
        let len = journald.recv(&mut bytes).unwrap();
        let mut rest = &bytes[..len];
        let mut fields = Vec::new();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let name = std::str::from_utf8(&rest[..end]).unwrap();
            let (len, value) = rest[end + 1..].split_first_chunk().unwrap();
            let (value, after) = value.split_at(u64::from_le_bytes(*len).try_into().unwrap());
            fields.push((name, std::str::from_utf8(value).unwrap()));
            rest = after.strip_prefix(b"\n").unwrap();
        }
        assert_eq!(
            fields,
            [
                ("PRIORITY", "4"),
                ("SYSLOG_IDENTIFIER", "xen-virtiod"),
                ("XEN_GUEST", "g\nPRIORITY=0"),
                ("XEN_DOMID", "7"),
                ("XEN_DEVICE", "virtio/0"),
                ("MESSAGE", "guest g\nPRIORITY=0 (7): virtio/0: is slow"),
            ]
        );
    }

    #[test]
    fn a_journal_that_is_started_again_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let first = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        drop(first);
        std::fs::remove_file(&path).unwrap();
        assert!(!journal.send(Level::INFO, &Record::default()));
        let _second = UnixDatagram::bind(&path).unwrap();
        assert!(journal.send(Level::INFO, &Record::default()));
    }

    #[test]
    fn a_journal_that_does_not_read_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let _journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        let record = Record {
            message: "x".repeat(10_000),
            ..Record::default()
        };
        // As many as are queued (net.unix.max_dgram_qlen), and one that is not taken.
        assert!((0..100_000).any(|_| !journal.send(Level::INFO, &record)));
    }
}
