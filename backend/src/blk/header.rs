//! The header of a block request (virtio 1.3, 5.2.6).

use super::disk::{Disk, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
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
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// A discard, or zeroes: which sectors, its data says.
    Erase(Erase),
    /// … and these they are.
    Erased {
        erase: Erase,
        offset: u64,
        bytes: u64,
        may_go: bool,
    },
}

/// What is to become of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Erase {
    /// The driver needs them no more.
    Discard,
    WriteZeroes,
}

/// Bytes of a `struct virtio_blk_discard_write_zeroes`: `le64 sector`, `le32 num_sectors`, `le32 flags`.
pub(super) const SEGMENT: usize = 16;

impl Erase {
    /// The specification's word for it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        }
    }

    /// Sectors of one request at most: what a reset or the next worker may have to wait for.
    pub(super) const fn most_sectors(self) -> u32 {
        match self {
            Self::Discard => 1 << 21,
            // Some devices are written for it.
            Self::WriteZeroes => 1 << 17,
        }
    }

    /// What `segment` asks for (virtio 1.3, 5.2.6.2).
    pub(super) fn parse(self, segment: [u8; SEGMENT], disk: &Disk) -> Result<Command, Status> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        let known = match self {
            Self::Discard => 0,
            Self::WriteZeroes => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let offset = sector.checked_mul(SECTOR);
        let offset = offset.filter(|offset| disk.contains(*offset, bytes));
        match offset {
            Some(offset) if sectors <= self.most_sectors() => Ok(Command::Erased {
                erase: self,
                offset,
                bytes,
                may_go: self == Self::Discard || flags != 0 && disk.erases().discards,
            }),
            _ => Err(Status::IoError),
        }
    }
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
            VIRTIO_BLK_T_DISCARD => Self::erase(Erase::Discard, readable, disk),
            VIRTIO_BLK_T_WRITE_ZEROES => Self::erase(Erase::WriteZeroes, readable, disk),
            _ => Err(Status::Unsupported),
        }
    }

    fn erase(erase: Erase, readable: usize, disk: &Disk) -> Result<Self, Status> {
        let has = match erase {
            Erase::Discard => disk.erases().discards,
            Erase::WriteZeroes => disk.erases().zeroes,
        };
        if !has {
            return Err(Status::Unsupported);
        }
        // One segment, as the configuration space says.
        match readable == SEGMENT && !disk.read_only() {
            true => Ok(Self::Erase(erase)),
            false => Err(Status::IoError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Erases;
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

    #[test]
    fn what_is_erased_lies_on_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * SECTOR).unwrap();
        let mut disk = Disk::open(file.path(), false).unwrap();
        let erase =
            |disk: &Disk, len| Command::parse(header(VIRTIO_BLK_T_DISCARD, 0), len, 0, disk);
        assert_eq!(erase(&disk, SEGMENT), Err(Status::Unsupported));
        disk.set_erases(Erases {
            discards: true,
            zeroes: false,
        });
        let zeroes = Command::parse(header(VIRTIO_BLK_T_WRITE_ZEROES, 0), SEGMENT, 0, &disk);
        assert_eq!(zeroes, Err(Status::Unsupported));
        assert_eq!(erase(&disk, SEGMENT), Ok(Command::Erase(Erase::Discard)));
        for len in [0, 15, 17, 32] {
            assert_eq!(erase(&disk, len), Err(Status::IoError));
        }
        let segment = |sector: u64, sectors: u32, flags: u32| {
            let mut segment = [0; SEGMENT];
            segment[..8].copy_from_slice(&sector.to_le_bytes());
            segment[8..12].copy_from_slice(&sectors.to_le_bytes());
            segment[12..].copy_from_slice(&flags.to_le_bytes());
            segment
        };
        let (discard, zeroes) = (Erase::Discard, Erase::WriteZeroes);
        let erased = |erase, may_go| {
            Ok(Command::Erased {
                erase,
                offset: 2 * SECTOR,
                bytes: 6 * SECTOR,
                may_go,
            })
        };
        for (erase, segment, expected) in [
            (discard, segment(2, 6, 0), erased(discard, true)),
            (zeroes, segment(2, 6, 0), erased(zeroes, false)),
            (zeroes, segment(2, 6, 1), erased(zeroes, true)),
            // virtio 1.3, 5.2.6.2: flags that are reserved, and unmap of a discard.
            (discard, segment(2, 6, 1), Err(Status::Unsupported)),
            (zeroes, segment(2, 6, 2), Err(Status::Unsupported)),
            (discard, segment(2, 7, 0), Err(Status::IoError)),
            (discard, segment(u64::MAX, 1, 0), Err(Status::IoError)),
            (zeroes, segment(0, u32::MAX, 0), Err(Status::IoError)),
        ] {
            assert_eq!(erase.parse(segment, &disk), expected, "{segment:?}");
        }
        // On a disk that has them, more than a request may have.
        disk.set_bytes(1 << 40);
        for erase in [discard, zeroes] {
            let most = erase.most_sectors();
            assert!(erase.parse(segment(0, most, 0), &disk).is_ok());
            assert!(erase.parse(segment(0, most + 1, 0), &disk).is_err());
        }
    }
}
