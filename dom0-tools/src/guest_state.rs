//! The state file of one guest: what a worker must find to go on where another was killed.
//!
//! Workers write it and workers read it, through shared memory. The supervisor hands it over and never looks
//! into it: a worker that its guest has taken over may have written anything there.

mod first_format;
mod records_format;

use crate::toolstack::libxl::{self, EntryKey};
use first_format::FirstFormat;
use records_format::RecordsFormat;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::rc::Rc;
use xen_virtio_backend::{DeviceType, RecordError, StateArea, StateCell, StateError};
use xen_virtio_guest_mapping::Permissions;
use xen_virtio_guest_mapping::xen::Mapping;
use xen_virtio_transport::{DeviceState, MmioRange};

/// The file's first word.
const MAGIC: u64 = u64::from_le_bytes(*b"xen-virt");
/// The second: the number of the layout. A program reads this one and all before it.
const FORMAT: u64 = 2;
const FIRST_FORMAT: u64 = 1;
const MAGIC_WORD: usize = 0;
const FORMAT_WORD: usize = 1;
/// The ioreq server, plus one.
const SERVER_WORD: usize = 2;
/// Entries of the directory of records, and bytes of the file, from layout 2 on.
const DIRECTORY_WORD: usize = 3;
const LENGTH_WORD: usize = 4;

/// Bytes of these words, and of those to come.
const HEADER: usize = 4096;

/// The largest file. So much of a worker's address space is kept for it: the file grows under the worker.
pub const MAX_BYTES: usize = 16 << 20;
/// Files grow by these: none of them is as long as one of the first layout.
const STEP: usize = 64 << 10;
const _: () = assert!(!first_format::BYTES.is_multiple_of(STEP));

/// Bytes of a file of the first layout, which do not change.
pub const FIRST_FORMAT_BYTES: usize = first_format::BYTES;

/// Bytes that a device takes which keeps words of its own in records of `own` bytes, and has queues of `queue_sizes`.
pub fn device_bytes(own: &[usize], queue_sizes: &[u16]) -> usize {
    records_format::device_bytes(own, queue_sizes)
}

/// Bytes of a file with room for devices that take `devices` together: twice that, so that devices of other sizes find
/// room where others were.
pub fn file_bytes(devices: usize) -> usize {
    records_format::file_bytes(2 * devices)
        .next_multiple_of(STEP)
        .min(MAX_BYTES)
}

/// Whether a state file can have this length.
pub fn is_file_length(bytes: u64) -> bool {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let grown = bytes.is_multiple_of(STEP) && (file_bytes(0)..=MAX_BYTES).contains(&bytes);
    grown || bytes == FIRST_FORMAT_BYTES
}

/// Why a guest cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum GuestStateError {
    #[error("the guest's state file cannot be mapped")]
    Map(#[from] io::Error),
    #[error("the guest's state file holds something else (it begins with {0:#x})")]
    Magic(u64),
    #[error(
        "the guest's state file has layout {0}, and this xen-virtiod knows those up to {FORMAT}: start the newer \
         version again"
    )]
    Format(u64),
    #[error("the guest's state file of {actual} bytes should have {expected}")]
    Length { expected: u64, actual: usize },
    #[error("the guest's state file has a directory of {0} records, which it has no room for")]
    Directory(usize),
    #[error("the guest's state file names the ioreq server {0}, which cannot be")]
    Server(u64),
    #[error("the guest's state file is damaged")]
    Damaged(#[from] StateError),
    #[error("the guest's state file cannot hold what is to be recorded")]
    Record(#[from] RecordError),
    #[error("the guest's state file does not say which device is which")]
    Name(#[from] serde_json::Error),
    #[error("the guest's state file has no room for another device")]
    Full,
    #[error(
        "an earlier version of xen-virtiod began with the guest, whose state file has no room for such a device: destroy \
         and create the guest"
    )]
    FirstFormat,
    #[error("the guest's state file has a device at {0:#x}, where none can be")]
    Base(u64),
    #[error(
        "another file or block device is where the guest's disk was: put that back, or destroy and create the guest \
         to have it use the new one"
    )]
    Replaced,
    #[error(
        "the guest has had a device of type {known} here, and it is of type {now} now: put the configuration back, or \
         destroy and create the guest"
    )]
    Type { known: u32, now: u32 },
    #[error(
        "nothing is recorded of it, although the guest has had it: destroy and create the guest"
    )]
    Unrecorded,
}

/// Which device a part of the state is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    pub key: EntryKey,
    /// Its page.
    pub base: u64,
    /// The first version did not record it.
    pub backing: Option<Backing>,
    /// A virtio device type number. The first layout was made for disks alone.
    #[serde(default = "block")]
    pub device_type: u32,
}

fn block() -> u32 {
    DeviceType::BLOCK.0
}

/// The file or block device that a device's contents are in, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    device: u64,
    /// Zero for a block device.
    inode: u64,
}

impl Backing {
    /// That which is open as `file`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn of(file: &File) -> io::Result<Self> {
        let status = file.metadata()?;
        let (device, inode) = if status.file_type().is_block_device() {
            (status.rdev(), 0)
        } else {
            (status.dev(), status.ino())
        };
        Ok(Self { device, inode })
    }
}

/// Where a layout keeps one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u64);

/// How a file is laid out behind its header.
trait Layout {
    /// The devices that there are.
    fn names(&self) -> Result<Vec<(Place, Name)>, GuestStateError>;
    /// A place for a device of which nothing is recorded; it is there once it has a name.
    fn add(&self, key: EntryKey) -> Result<Place, GuestStateError>;
    fn set_name(&self, place: Place, name: &[u8]) -> Result<(), GuestStateError>;
    fn remove(&self, place: Place);
    fn own(&self, place: Place, index: u16, len: usize) -> Result<StateArea, GuestStateError>;
    fn registers(&self, place: Place, capacity: usize) -> Result<StateCell, GuestStateError>;
    fn journal(&self, place: Place, queue: u16, size: u16) -> Result<StateArea, GuestStateError>;
    /// The file has `bytes` now.
    fn grow(&self, bytes: usize);
}

/// A guest's state.
pub struct GuestState {
    area: StateArea,
    layout: Box<dyn Layout>,
}

/// One device's part of it.
pub struct DeviceRecords<'a> {
    layout: &'a dyn Layout,
    place: Place,
    is_new: bool,
}

impl DeviceRecords<'_> {
    /// Whether nothing was recorded of the device before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The device's own record number `index`, of at least `len` bytes: zeros of a device that is new.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`] if there is no room for it.
    pub fn own(&self, index: u16, len: usize) -> Result<StateArea, GuestStateError> {
        self.layout.own(self.place, index, len)
    }

    /// The registers and journals of a device with queues of up to `queue_sizes`.
    ///
    /// # Errors
    ///
    /// As [`DeviceRecords::own`].
    pub fn device_state(&self, queue_sizes: &[u16]) -> Result<DeviceState, GuestStateError> {
        let capacity = DeviceState::registers_bytes(queue_sizes.len());
        let registers = self.layout.registers(self.place, capacity)?;
        let journals = queue_sizes.iter().zip(0..);
        let journals = journals.map(|(size, queue)| self.layout.journal(self.place, queue, *size));
        Ok(DeviceState::new(
            registers,
            journals.collect::<Result<_, _>>()?,
        ))
    }
}

impl GuestState {
    /// The state in `file`, which may be closed afterwards, and may grow.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn map(file: &File) -> Result<Self, GuestStateError> {
        let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let mapping = Mapping::new(file, 0, MAX_BYTES, Permissions::ReadWrite)?;
        Self::new(StateArea::new(Rc::new(mapping), MAX_BYTES), bytes)
    }

    /// The state in `area`, of a file of `bytes`; zeros are that of a guest that nobody has served.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`] if this program cannot go on from it.
    pub fn new(area: StateArea, bytes: usize) -> Result<Self, GuestStateError> {
        let length = |expected: usize| GuestStateError::Length {
            expected: expected as u64,
            actual: bytes,
        };
        if bytes > area.len() || bytes < file_bytes(0) {
            return Err(length(file_bytes(0)));
        }
        let layout: Box<dyn Layout> = match (area.load(MAGIC_WORD), area.load(FORMAT_WORD)) {
            (0, _) if bytes == FIRST_FORMAT_BYTES => {
                // As the version has made it that died before it wrote more.
                area.store(FORMAT_WORD, FIRST_FORMAT);
                area.store(MAGIC_WORD, MAGIC);
                Box::new(FirstFormat::new(area.clone()))
            }
            (0, _) => {
                area.store(LENGTH_WORD, bytes as u64);
                area.store(DIRECTORY_WORD, records_format::ENTRIES as u64);
                area.store(FORMAT_WORD, FORMAT);
                area.store(MAGIC_WORD, MAGIC);
                let entries = records_format::ENTRIES;
                Box::new(RecordsFormat::new(&area, entries, bytes)?)
            }
            (MAGIC, FIRST_FORMAT) if bytes == FIRST_FORMAT_BYTES => {
                Box::new(FirstFormat::new(area.clone()))
            }
            (MAGIC, FIRST_FORMAT) => return Err(length(FIRST_FORMAT_BYTES)),
            (MAGIC, FORMAT) => {
                let expected = area.load(LENGTH_WORD);
                if expected > bytes as u64 {
                    let actual = bytes;
                    return Err(GuestStateError::Length { expected, actual });
                }
                let entries = usize::try_from(area.load(DIRECTORY_WORD)).unwrap_or(usize::MAX);
                Box::new(RecordsFormat::new(&area, entries, bytes)?)
            }
            (MAGIC, format) => return Err(GuestStateError::Format(format)),
            (other, _) => return Err(GuestStateError::Magic(other)),
        };
        Ok(Self { area, layout })
    }

    /// The file has grown to `bytes`, if it can grow.
    pub fn grow(&self, bytes: usize) {
        self.layout.grow(bytes);
        if self.area.load(FORMAT_WORD) == FORMAT {
            self.area.store(LENGTH_WORD, bytes as u64);
        }
    }

    /// The guest's ioreq server, if one was made.
    ///
    /// # Errors
    ///
    /// [`GuestStateError::Server`].
    pub fn server(&self) -> Result<Option<u16>, GuestStateError> {
        match self.area.load(SERVER_WORD) {
            0 => Ok(None),
            word => match u16::try_from(word - 1) {
                Ok(server) => Ok(Some(server)),
                Err(_) => Err(GuestStateError::Server(word - 1)),
            },
        }
    }

    pub fn set_server(&self, server: u16) {
        self.area.store(SERVER_WORD, u64::from(server) + 1);
    }

    /// The records of the device `name`: empty ones, if there are none yet, and the guest has not had it (`served`).
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn device(&self, name: &Name, served: bool) -> Result<DeviceRecords<'_>, GuestStateError> {
        let layout = &*self.layout;
        let is_it = |other: &Name| other.key == name.key && other.base == name.base;
        let mut names = layout.names()?.into_iter();
        let (place, is_new) = match names.find(|(_, other)| is_it(other)) {
            Some((place, known)) => {
                if known.backing.is_some() && known.backing != name.backing {
                    return Err(GuestStateError::Replaced);
                }
                if known.device_type != name.device_type {
                    return Err(GuestStateError::Type {
                        known: known.device_type,
                        now: name.device_type,
                    });
                }
                (place, false)
            }
            None if served => return Err(GuestStateError::Unrecorded),
            None => {
                // What was at another address is another device, which the guest cannot have known.
                self.forget(name.key)?;
                (layout.add(name.key)?, true)
            }
        };
        layout.set_name(place, &serde_json::to_vec(name)?)?;
        Ok(DeviceRecords {
            layout,
            place,
            is_new,
        })
    }

    /// Every device that something is recorded of, with its page, and with its registers alone.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn devices(&self) -> Result<Vec<(EntryKey, MmioRange, DeviceState)>, GuestStateError> {
        let device = |(place, name): (Place, Name)| {
            let range = libxl::page(name.base).ok_or(GuestStateError::Base(name.base))?;
            let records = DeviceRecords {
                layout: &*self.layout,
                place,
                is_new: false,
            };
            Ok((name.key, range, records.device_state(&[])?))
        };
        self.layout.names()?.into_iter().map(device).collect()
    }

    /// The device is no more.
    ///
    /// # Errors
    ///
    /// [`GuestStateError`].
    pub fn forget(&self, key: EntryKey) -> Result<(), GuestStateError> {
        for (place, name) in self.layout.names()? {
            if name.key == key {
                self.layout.remove(place);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
