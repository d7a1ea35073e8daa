//! The header of a block request (virtio 1.3, 5.2.6).

use super::disk::{Disk, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// Bytes of a header: `le32 type`, `le32 reserved`, `le64 sector`.
pub(super) const HEADER: usize = 16;

/// What the last byte of a request tells the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        status.to_le_bytes()[0]
    }
}

/// A request as it is carried out: checked against the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
}

impl Command {
    /// What `header` asks for, with `readable` bytes of data from the driver and `writable` for it.
    pub(super) fn parse(
        header: [u8; HEADER],
        readable: usize,
        writable: usize,
        disk: &Disk,
    ) -> Result<Self, Status> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let place = |len: usize| {
            let offset = u64::from_le_bytes(sector).checked_mul(SECTOR)?;
            disk.contains(offset, len as u64).then_some(offset)
        };
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => place(writable)
                .map(|offset| Self::Read { offset })
                .ok_or(Status::IoError),
            // virtio 1.3, 5.2.6.2: a write to a read-only disk fails and writes nothing.
            VIRTIO_BLK_T_OUT if disk.read_only() => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => place(readable)
                .map(|offset| Self::Write { offset })
                .ok_or(Status::IoError),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            _ => Err(Status::Unsupported),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, sector: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    #[test]
    fn a_command_lies_on_the_disk_or_fails() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * SECTOR).unwrap();
        let disk = Disk::open(file.path(), false).unwrap();
        let read_only = Disk::open(file.path(), true).unwrap();
        let read = |sector, len| Command::parse(header(VIRTIO_BLK_T_IN, sector), 0, len, &disk);
        let write = |sector, len| Command::parse(header(VIRTIO_BLK_T_OUT, sector), len, 0, &disk);
        assert_eq!(read(0, 4096), Ok(Command::Read { offset: 0 }));
        assert_eq!(read(7, 512), Ok(Command::Read { offset: 7 * SECTOR }));
        assert_eq!(write(7, 512), Ok(Command::Write { offset: 7 * SECTOR }));
        for (sector, len) in [
            (8, 512),
            (7, 1024),
            (0, 511),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 0),
        ] {
            assert_eq!(read(sector, len), Err(Status::IoError), "{sector} {len}");
            assert_eq!(write(sector, len), Err(Status::IoError), "{sector} {len}");
        }
        let refused = Command::parse(header(VIRTIO_BLK_T_OUT, 0), 512, 0, &read_only);
        assert_eq!(refused, Err(Status::IoError));
        assert_eq!(
            Command::parse(header(77, 0), 0, 0, &disk),
            Err(Status::Unsupported)
        );
    }
}
