//! What a guest's disk is kept in: a raw file or a block device.

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, StatxFlags, fallocate, fcntl_getfl, fcntl_setfl,
    statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use xen_virtio_guest_mapping::PAGE_SIZE;

/// The unit of a request's sector number and of the capacity, whatever the block size
/// (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;

/// The block size that a guest sees of a disk kept in a file.
const FILE_BLOCK: u32 = 512;

const O_NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;
const O_PATH: i32 = OFlags::PATH.bits() as i32;

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
    #[error(
        "disk {}: is a read-only device (blockdev --getro), and the guest is to write it: make it writable, or give it \
         to the guest with access=ro",
        .path.display()
    )]
    ReadOnly { path: PathBuf },
}

/// An open disk. Its size is fixed when it is opened: no request changes it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    bytes: u64,
    block_size: u32,
    read_only: bool,
    erases: Erases,
    topology: Option<Topology>,
    /// The page cache is to keep nothing of it.
    passes_cache: bool,
}

/// What dom0's page cache holds of a disk, which its guest holds in its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Nothing: transfers pass it by.
    Direct,
    /// What is being transferred.
    Passing,
    /// What was read and written, as long as there is room.
    Kept,
}

/// The sizes of transfers that suit a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// What it writes at once, and reads before it writes a part of that.
    pub physical_block: u32,
    /// The least that suits it.
    pub least: u32,
    /// What suits it best, zero if nothing in particular does.
    pub best: u32,
}

/// How parts of a disk can be erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erases {
    /// They are given back, and are zeros then.
    pub discards: bool,
    /// They are zeros, and keep their room.
    pub zeroes: bool,
}

impl Disk {
    /// Opens the raw file or block device at `path`.
    ///
    /// # Errors
    ///
    /// [`DiskError`], which names the path.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let disk = Self::open_again(path, read_only)?;
        if !read_only && disk.device_is_read_only() {
            return Err(DiskError::ReadOnly { path: path.into() });
        }
        Ok(disk)
    }

    /// As [`Disk::open`], for a guest that has had the disk: what its driver settled on holds, whatever has
    /// become of the device meanwhile.
    ///
    /// # Errors
    ///
    /// As for [`Disk::open`].
    pub fn open_again(path: &Path, read_only: bool) -> Result<Self, DiskError> {
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
        let place = look_at(path).map_err(open_error)?;
        let kind = place.metadata().map_err(open_error)?.file_type();
        // Opening alone starts a watchdog, rewinds a tape, or waits for a FIFO's other end.
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: path.into() });
        }
        let file = open_place(&place, read_only, 0).map_err(open_error)?;
        Self::from_file(file, read_only).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => DiskError::Kind { path: path.into() },
            io::ErrorKind::UnexpectedEof => DiskError::Empty {
                path: path.into(),
                bytes: std::fs::metadata(path).map_or(0, |data| data.len()),
            },
            _ => open_error(error),
        })
    }

    /// What hangs like a disk that does not answer: the end of a pipe.
    #[cfg(test)]
    pub(super) fn of_pipe(file: File, sectors: u64) -> Self {
        Self {
            file,
            bytes: sectors * SECTOR,
            block_size: FILE_BLOCK,
            read_only: false,
            erases: Erases::default(),
            topology: None,
            passes_cache: false,
        }
    }

    /// Whether somebody uses the block device as a whole: a file system that is mounted, another device that is
    /// made of it, a disk of Xen's own back-end. False for a file.
    pub fn is_claimed(&self) -> bool {
        let is_block = self
            .file
            .metadata()
            .is_ok_and(|data| data.file_type().is_block_device());
        // Without O_CREAT this asks for a block device for oneself alone (open(2)), here for a moment.
        let excl = OFlags::EXCL.bits().cast_signed();
        let alone = || open_place(&self.file, true, excl);
        is_block && alone().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
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
            erases: Erases::default(),
            topology: None,
            passes_cache: false,
        })
    }

    /// The disk is to be erased so; how it can be, [`Disk::can_erase`] tells.
    pub fn set_erases(&mut self, erases: Erases) {
        self.erases = match self.read_only {
            true => Erases::default(),
            false => erases,
        };
    }

    pub fn erases(&self) -> Erases {
        self.erases
    }

    /// The driver is to be told of `topology`; what the disk has, [`Disk::measure_topology`] tells.
    pub fn set_topology(&mut self, topology: Option<Topology>) {
        self.topology = topology;
    }

    pub fn topology(&self) -> Option<Topology> {
        self.topology
    }

    /// The sizes that suit the block device, or the file system that the file is in; none if those are not known.
    pub fn measure_topology(&self) -> Option<Topology> {
        let data = self.file.metadata().ok()?;
        let topology = match data.file_type().is_block_device() {
            true => {
                let size = |name: &str| attribute(data.rdev(), name)?.parse().ok();
                Topology {
                    physical_block: size("queue/physical_block_size")?,
                    least: size("queue/minimum_io_size")?,
                    best: size("queue/optimal_io_size")?,
                }
            }
            false => {
                let block = u32::try_from(data.blksize()).ok()?;
                Topology {
                    physical_block: block,
                    least: block,
                    best: 0,
                }
            }
        };
        let fits = |bytes: u32| bytes.is_multiple_of(self.block_size);
        let block = topology.physical_block;
        let is_sound = block.is_power_of_two() && [block, topology.least].into_iter().all(fits);
        is_sound.then_some(topology)
    }

    pub fn caching(&self) -> Caching {
        match fcntl_getfl(&self.file) {
            Ok(flags) if flags.contains(OFlags::DIRECT) => Caching::Direct,
            _ if self.passes_cache => Caching::Passing,
            _ => Caching::Kept,
        }
    }

    /// The page cache is to keep nothing of a disk that does not pass it by; whether that can be,
    /// [`Disk::can_keep_nothing_cached`] tells.
    pub fn keep_nothing_cached(&mut self) {
        self.passes_cache = true;
    }

    /// Whether the kernel and the file system have reads and writes of which the page cache keeps nothing (Linux 6.14,
    /// `RWF_DONTCACHE`).
    pub fn can_keep_nothing_cached(&self) -> bool {
        let mut sector = [0; FILE_BLOCK as usize];
        let mut buffers = [io::IoSliceMut::new(&mut sector)];
        // Not by waiting for the disk: what it would wait for is an answer too.
        let flags = ReadWriteFlags::from_bits_retain(libc::RWF_DONTCACHE.cast_unsigned())
            | ReadWriteFlags::NOWAIT;
        let mut read = || preadv2(&self.file, &mut buffers, 0, flags);
        self.caching() != Caching::Direct && matches!(read(), Ok(_) | Err(Errno::AGAIN))
    }

    /// How it can be erased.
    pub fn can_erase(&self) -> Erases {
        let Ok(data) = self.file.metadata() else {
            return Erases::default();
        };
        if data.file_type().is_block_device() {
            let most = attribute(data.rdev(), "queue/write_zeroes_max_bytes");
            // Linux writes zeroes itself, where it has to.
            return Erases {
                discards: most.is_some_and(|most| most != "0"),
                zeroes: true,
            };
        }
        // Behind its end there is nothing to lose, and what is reserved there is given back.
        let end = data.len().next_multiple_of(PAGE_SIZE as u64);
        let can = |how: FallocateFlags| {
            let how = how | FallocateFlags::KEEP_SIZE;
            !self.read_only && fallocate(&self.file, how, end, PAGE_SIZE as u64).is_ok()
        };
        let zeroes = can(FallocateFlags::ZERO_RANGE);
        let discards = can(FallocateFlags::PUNCH_HOLE);
        Erases { discards, zeroes }
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

    /// Shows `bytes` of the disk, whole sectors, whatever it has: what the guest was told of.
    pub fn set_bytes(&mut self, bytes: u64) {
        self.bytes = bytes / SECTOR * SECTOR;
    }

    /// What the disk has now, a multiple of [`SECTOR`].
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn measure(&self) -> io::Result<u64> {
        // A place in the file that nothing depends on: transfers name theirs.
        Ok((&self.file).seek(SeekFrom::End(0))? / SECTOR * SECTOR)
    }

    /// Whether the block device takes no writes, whatever it was opened for.
    fn device_is_read_only(&self) -> bool {
        let data = self.file.metadata();
        let device = data.map(|data| data.file_type().is_block_device().then(|| data.rdev()));
        device.is_ok_and(|device| {
            device.is_some_and(|device| attribute(device, "ro").is_some_and(|ro| ro == "1"))
        })
    }

    pub fn into_file(self) -> File {
        self.file
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether `len` bytes from byte `offset` are whole sectors of this disk.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        len.is_multiple_of(SECTOR) && offset.checked_add(len).is_some_and(|end| end <= self.bytes)
    }
}

/// What is at `path`, opened for nothing but to be looked at. For a block device that is the kernel's own node of it,
/// whichever of its nodes the path names: a lock is of a node.
fn look_at(path: &Path) -> io::Result<File> {
    let look = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .custom_flags(O_PATH)
            .open(path)
    };
    let place = look(path)?;
    let data = place.metadata()?;
    if !data.file_type().is_block_device() {
        return Ok(place);
    }
    let name = attribute(data.rdev(), "uevent").and_then(|uevent| {
        let mut lines = uevent.lines();
        lines.find_map(|line| line.strip_prefix("DEVNAME=").map(str::to_owned))
    });
    let own = name.and_then(|name| look(&Path::new("/dev").join(name)).ok());
    let is_same = |own: &File| {
        own.metadata()
            .is_ok_and(|own| own.file_type().is_block_device() && own.rdev() == data.rdev())
    };
    Ok(own.filter(is_same).unwrap_or(place))
}

/// What sysfs says of a block device, on one line or more.
fn attribute(device: u64, name: &str) -> Option<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}")).ok()?;
    Some(text.trim_end().to_owned())
}

/// Opens what was looked at, and nothing else, whatever its path leads to by now.
fn open_place(place: &File, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(O_NONBLOCK | flags)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
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

    /// A FIFO of which nobody has the other end: opening it for reading does not fail, and does not go unnoticed.
    #[test]
    fn what_is_no_disk_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("watchdog");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        let link = directory.path().join("disk.img");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        let opened = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let sees = std::sync::Arc::clone(&opened);
        std::thread::spawn(move || {
            // Waits for a reader.
            let _writer = OpenOptions::new().write(true).open(fifo);
            sees.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        for read_only in [true, false] {
            let refused = Disk::open(&link, read_only);
            assert!(
                matches!(refused, Err(DiskError::Kind { .. })),
                "{refused:?}"
            );
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(
            !opened.load(std::sync::atomic::Ordering::SeqCst),
            "it was opened"
        );
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
            (Path::new("/dev/tty"), true),
            (empty.path(), false),
        ] {
            let error = Disk::open(path, read_only).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
