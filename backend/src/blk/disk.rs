//! What a guest's disk is kept in: a raw file or a block device.

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use xen_virtio_guest_mapping::PAGE_SIZE;

/// The unit of a request's sector number and of the capacity, whatever the block size
/// (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;

/// The block size that a guest sees of a disk kept in a file.
const FILE_BLOCK: u32 = 512;

const O_NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;

/// Why a path cannot be a guest's disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk {}: cannot be opened for {mode}", .path.display())]
    Open {
        path: PathBuf,
        mode: &'static str,
        source: io::Error,
    },
    #[error("disk {}: is neither a regular file nor a block device", .path.display())]
    Kind { path: PathBuf },
    #[error("disk {}: {bytes} bytes are less than a sector of {SECTOR}", .path.display())]
    Empty { path: PathBuf, bytes: u64 },
}

/// An open disk. Its size is fixed when it is opened: no request changes it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    bytes: u64,
    block_size: u32,
    read_only: bool,
}

impl Disk {
    /// Opens the raw file or block device at `path`.
    ///
    /// # Errors
    ///
    /// [`DiskError`], which names the path.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let mode = if read_only {
            "reading"
        } else {
            "reading and writing"
        };
        let open_error = |source| DiskError::Open {
            path: path.into(),
            mode,
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // A FIFO in its place must not make us wait for its other end.
            .custom_flags(O_NONBLOCK)
            .open(path)
            .map_err(open_error)?;
        Self::from_file(file, read_only).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => DiskError::Kind { path: path.into() },
            io::ErrorKind::UnexpectedEof => DiskError::Empty {
                path: path.into(),
                bytes: std::fs::metadata(path).map_or(0, |data| data.len()),
            },
            _ => open_error(error),
        })
    }

    /// A disk of a file that somebody else opened, for writing unless `read_only`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for what is neither a file nor a block device, `UnexpectedEof` for less than a
    /// sector, else the system's.
    pub fn from_file(mut file: File, read_only: bool) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let block_size = if kind.is_block_device() {
            rustix::fs::ioctl_blksszget(&file)?
        } else if kind.is_file() {
            FILE_BLOCK
        } else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let bytes = file.seek(SeekFrom::End(0))? / SECTOR * SECTOR;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // O_NONBLOCK was for opening; io_uring would fail a transfer that has to wait.
        let mut flags = fcntl_getfl(&file)? - OFlags::NONBLOCK;
        flags.set(OFlags::DIRECT, takes_direct_io(&file, block_size));
        fcntl_setfl(&file, flags)?;
        Ok(Self {
            file,
            bytes,
            block_size,
            read_only,
        })
    }

    /// The size, a multiple of [`SECTOR`]; what a file has beyond its last whole sector is not reachable.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether `len` bytes from byte `offset` are whole sectors of this disk.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        len.is_multiple_of(SECTOR) && offset.checked_add(len).is_some_and(|end| end <= self.bytes)
    }
}

/// Whether every sector can be transferred past the page cache, which would hold in dom0's memory what the
/// guest holds in its own.
fn takes_direct_io(file: &File, block_size: u32) -> bool {
    let mask = StatxFlags::DIOALIGN | StatxFlags::TYPE;
    let Ok(stat) = statx(file, "", AtFlags::EMPTY_PATH, mask) else {
        return false;
    };
    // A driver may use sectors whatever block size it is told of (virtio 1.3, 5.2.6).
    let takes_sectors = |alignment: u32| alignment != 0 && u64::from(alignment) <= SECTOR;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        // Linux does not say so of each block device; all of them take whole blocks.
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        return kind == FileType::BlockDevice && takes_sectors(block_size);
    }
    takes_sectors(stat.stx_dio_offset_align) && stat.stx_dio_mem_align as usize <= PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_whole_sectors_of_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(5 * SECTOR + 100).unwrap();
        let disk = Disk::open(file.path(), false).unwrap();
        assert_eq!(
            (disk.bytes(), disk.block_size(), disk.read_only()),
            (5 * SECTOR, 512, false)
        );
        for (offset, len, inside) in [
            (0, 5 * SECTOR, true),
            (5 * SECTOR, 0, true),
            (4 * SECTOR, 2 * SECTOR, false),
            (0, 100, false),
            (u64::MAX - 511, SECTOR, false),
        ] {
            assert_eq!(disk.contains(offset, len), inside, "{offset} {len}");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let empty = tempfile::NamedTempFile::new().unwrap();
        for (path, read_only) in [
            (directory.path(), true),
            (directory.path(), false),
            (Path::new("/nonexistent/disk.img"), false),
            (Path::new("/dev/null"), false),
            (empty.path(), false),
        ] {
            let error = Disk::open(path, read_only).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
