//! A toolstack in a file: the devices of guests that no other toolstack describes (dom0less, Xen before 4.18, a guest whose
//! configuration nobody may change).
//!
//! A file says of each device what libxl says in xenstore. When the guest of its name comes up, that is written there, and is
//! what holds until the guest ends, whatever becomes of the file.

mod device_tree;

use crate::devices::{self, DeviceKind, Service};

use crate::toolstack::Identity;
use crate::toolstack::libxl::{self, EntryForm, EntryKey, MAX_DEVICES};
use crate::toolstack::xenstore::{XenStore, XenStoreError};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use device_tree::device_tree;

/// Where the files are: the guest's name, and `.toml`.
pub const DIRECTORY: &str = "/etc/xen-virtiod/guests";

/// Where devices are unless their file says otherwise, one behind the other, as libxl has it (`GUEST_VIRTIO_MMIO_BASE`).
const FIRST_BASE: u64 = 0x0200_0000;
/// The first of their interrupts (`GUEST_VIRTIO_MMIO_SPI_FIRST`).
const FIRST_INTERRUPT: u32 = 33;
/// Interrupts from here on are shared ones, which a device tree counts from zero.
const FIRST_SHARED: u32 = 32;
const LAST_SHARED: u32 = 1019;

/// Bytes of a device's settings: what is sent to xenstored at once has 4096 (`XENSTORE_PAYLOAD_MAX`), with the path.
const MAX_SETTINGS: usize = 3500;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GuestFileError {
    #[error("{} cannot be read", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no file of a guest's devices: {error}", .path.display())]
    Parse {
        path: PathBuf,
        error: toml::de::Error,
    },
    #[error("{}: [[device]] number {index}: {problem}", .path.display())]
    Device {
        path: PathBuf,
        index: usize,
        problem: String,
    },
    #[error("{} has {count} devices, and a guest can have {MAX_DEVICES}", .path.display())]
    Count { path: PathBuf, count: usize },
    #[error(transparent)]
    XenStore(#[from] XenStoreError),
}

/// What we write of a guest, and whatever ends with it: the mark of whose that is comes last.
const FORMS: [EntryForm; 2] = [EntryForm::Attached, EntryForm::File];

/// What a file says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestFile {
    #[serde(default, rename = "device")]
    devices: Vec<DeviceTable>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct DeviceTable {
    /// The name of its kind.
    #[serde(rename = "type")]
    kind: String,
    base: Option<u64>,
    interrupt: Option<u32>,
    #[serde(default = "yes", alias = "grant_usage")]
    grant_usage: bool,
    #[serde(flatten)]
    settings: toml::Table,
}

fn yes() -> bool {
    true
}

/// A device of a guest's file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileDevice {
    /// A virtio device type number.
    pub device_type: u32,
    pub base: u64,
    /// As the guest's interrupt controller counts.
    pub interrupt: u32,
    pub grant_usage: bool,
    /// What a device of its kind is made of.
    pub settings: toml::Table,
}

/// The files of guests.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    directory: PathBuf,
}

impl GuestFiles {
    /// Those in `directory`, which need not be there.
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// The devices of guest `name`; none without a file.
    ///
    /// # Errors
    ///
    /// [`GuestFileError`], which names the file and what is wrong in it.
    pub fn devices(&self, name: &str) -> Result<Vec<FileDevice>, GuestFileError> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Ok(Vec::new());
        }
        let path = self.directory.join(format!("{name}.toml"));
        match fs::read_to_string(&path) {
            Ok(text) => parse(&path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(GuestFileError::Read { path, source }),
        }
    }

    /// The names of the guests that have files.
    pub fn names(&self) -> Vec<String> {
        let files = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let name = |file: fs::DirEntry| {
            let name = file.file_name().into_string().ok()?;
            Some(name.strip_suffix(".toml")?.to_owned())
        };
        let mut names: Vec<_> = files.filter_map(name).collect();
        names.sort_unstable();
        names
    }

    /// The other files that are where those of guests are.
    pub fn strangers(&self) -> Vec<String> {
        let files = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let names = files.filter_map(|file| file.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| !name.ends_with(".toml")).collect();
        names.sort_unstable();
        names
    }

    /// Writes to xenstore what the files say of `guest`, when that is first seen. A guest that is served already (`served`)
    /// has been there for longer: it gets nothing that it has not had.
    ///
    /// # Errors
    ///
    /// [`GuestFileError`].
    pub(crate) fn announce(
        &self,
        store: &mut XenStore,
        guest: &Identity,
        served: bool,
    ) -> Result<(), GuestFileError> {
        if is_written_of(store, guest)? {
            return Ok(());
        }
        // Of another guest of this domid, or of one that was not written to its end.
        remove(store, guest.domid)?;
        let devices = match trusted_name(store, guest.domid)? {
            Some(name) if !served => self.devices(&name)?,
            _ => Vec::new(),
        };
        for (device, devid) in devices.iter().zip(0..) {
            let key = EntryKey {
                form: EntryForm::File,
                devid,
            };
            device.write(store, guest.domid, key)?;
        }
        // Last: with it the guest is not looked at again.
        store.write(&mark_path(guest.domid), mark(guest))?;
        Ok(())
    }
}

impl fmt::Display for FileDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind_name();
        let memory = match self.grant_usage {
            true => "granted pages only",
            false => "any page of the guest",
        };
        let (base, interrupt) = (self.base, self.interrupt);
        write!(
            f,
            "{kind} at {base:#x}, interrupt {interrupt}; touches {memory}"
        )
    }
}

impl FileDevice {
    /// The name of its kind.
    pub fn kind_name(&self) -> &'static str {
        self.kind().map_or("?", DeviceKind::name)
    }

    fn kind(&self) -> anyhow::Result<&'static dyn DeviceKind> {
        devices::kind(self.device_type, Service::of(&self.settings))
    }

    /// What it will not be served for, as dom0 is now.
    pub fn warnings(&self) -> Vec<String> {
        self.kind()
            .map_or_else(|_| Vec::new(), |kind| kind.warnings(&self.settings))
    }

    /// Writes to xenstore that guest `domid` has it, as entry `key`.
    ///
    /// # Errors
    ///
    /// [`XenStoreError`].
    pub(super) fn write(
        &self,
        store: &mut XenStore,
        domid: u16,
        key: EntryKey,
    ) -> Result<(), XenStoreError> {
        let path = libxl::entry_path(domid, key);
        for (node, value) in [
            ("type", format!("virtio,device{:x}", self.device_type)),
            ("base", format!("{:#x}", self.base)),
            ("irq", self.interrupt.to_string()),
            ("grant_usage", u8::from(self.grant_usage).to_string()),
            ("settings", json(&self.settings)),
            // Last: with it the entry is there.
            ("state", "1".to_owned()),
        ] {
            store.write(&format!("{path}/{node}"), &value)?;
        }
        Ok(())
    }
}

/// Removes what was written of the guest that has `domid`, or has had it.
fn remove(store: &mut XenStore, domid: impl Display) -> Result<(), XenStoreError> {
    for form in FORMS {
        store.remove(&format!("backend/{}/{domid}", form.directory()))?;
    }
    Ok(())
}

/// The guest's name, if it is not the guest's own to choose: whoever has a name has its devices. A guest of
/// `init-dom0less` may write its name, and counts by the one that it has got from there.
fn trusted_name(store: &mut XenStore, domid: u16) -> Result<Option<String>, XenStoreError> {
    let path = format!("/local/domain/{domid}/name");
    let name = store.read(&path)?;
    let own = format!("dom0less-{domid}");
    Ok(match store.owner(&path)? {
        Some(0) => name,
        _ => name.filter(|name| *name == own),
    })
}

/// Tells the guests apart that have a domid one after the other.
pub(super) fn mark(guest: &Identity) -> &str {
    guest.vm.as_deref().unwrap_or("none")
}

fn mark_path(domid: impl Display) -> String {
    format!("{}/{domid}/guest", root())
}

/// Whether what is written of its domid is the guest's.
pub(super) fn is_written_of(store: &mut XenStore, guest: &Identity) -> Result<bool, XenStoreError> {
    Ok(store.read(&mark_path(guest.domid))?.as_deref() == Some(mark(guest)))
}

/// The names below which something was written of guests: domids, unless somebody else has written there.
///
/// # Errors
///
/// [`XenStoreError`].
pub(crate) fn written(store: &mut XenStore) -> Result<BTreeSet<String>, XenStoreError> {
    let mut domids = BTreeSet::new();
    for form in FORMS {
        domids.extend(store.directory(&format!("backend/{}", form.directory()))?);
    }
    Ok(domids)
}

/// Forgets what was written of guests that have had the domid of name `domid`, but for `guest`, which has it now.
///
/// # Errors
///
/// [`XenStoreError`].
pub(crate) fn keep_only(
    store: &mut XenStore,
    domid: &str,
    guest: Option<&Identity>,
) -> Result<(), XenStoreError> {
    let written = store.read(&mark_path(domid))?;
    if guest.is_none_or(|guest| written.as_deref() != Some(mark(guest))) {
        remove(store, domid)?;
    }
    Ok(())
}

/// Forgets what was written of a guest that is gone. Another one may have its domid already.
///
/// # Errors
///
/// [`XenStoreError`].
pub(crate) fn forget(store: &mut XenStore, guest: &Identity) -> Result<(), XenStoreError> {
    if is_written_of(store, guest)? {
        remove(store, guest.domid)?;
    }
    Ok(())
}

fn root() -> String {
    format!("backend/{}", EntryForm::File.directory())
}

fn parse(path: &Path, text: &str) -> Result<Vec<FileDevice>, GuestFileError> {
    let file: GuestFile = toml::from_str(text).map_err(|error| GuestFileError::Parse {
        path: path.into(),
        error,
    })?;
    let count = file.devices.len();
    if count > MAX_DEVICES {
        return Err(GuestFileError::Count {
            path: path.into(),
            count,
        });
    }
    let mut devices: Vec<FileDevice> = Vec::new();
    for (index, table) in file.devices.into_iter().enumerate() {
        let device = device(index, table, &devices).map_err(|problem| GuestFileError::Device {
            path: path.into(),
            index,
            problem,
        })?;
        devices.push(device);
    }
    Ok(devices)
}

/// A table as one value in xenstore.
fn json(settings: &toml::Table) -> String {
    serde_json::to_string(settings).expect("a table without binary keys")
}

/// # Errors
///
/// If xenstore has no room for `settings`.
pub(super) fn check_room(settings: &toml::Table) -> Result<(), String> {
    let len = json(settings).len();
    if len > MAX_SETTINGS {
        return Err(format!(
            "its settings take {len} bytes, and xenstore has room for {MAX_SETTINGS}"
        ));
    }
    Ok(())
}

/// The device number `index`, behind the `others`.
///
/// # Errors
///
/// What is wrong with it.
fn device(index: usize, table: DeviceTable, others: &[FileDevice]) -> Result<FileDevice, String> {
    let DeviceTable {
        kind: name,
        base,
        interrupt,
        grant_usage,
        settings,
    } = table;
    let kind = devices::kind_named(&name, &settings)?;
    kind.check_settings(&settings)
        .map_err(|error| format!("{error:#}"))?;
    check_room(&settings)?;
    let number = u32::try_from(index).expect("few devices");
    let base = base.unwrap_or(FIRST_BASE + u64::from(number) * libxl::PAGE_LEN);
    let interrupt = interrupt.unwrap_or(FIRST_INTERRUPT + number);
    let range = libxl::page(base)
        .ok_or_else(|| format!("base = {base:#x} is no multiple of {:#x}", libxl::PAGE_LEN))?;
    if !(FIRST_SHARED..=LAST_SHARED).contains(&interrupt) {
        return Err(format!(
            "interrupt = {interrupt} is no shared one, from {FIRST_SHARED} to {LAST_SHARED}"
        ));
    }
    for other in others {
        if libxl::page(other.base).is_some_and(|other| other.overlaps(&range)) {
            return Err(format!("base = {base:#x} is another device's too"));
        }
        if other.interrupt == interrupt {
            return Err(format!("interrupt = {interrupt} is another device's too"));
        }
    }
    Ok(FileDevice {
        device_type: kind.device_type().0,
        base,
        interrupt,
        grant_usage,
        settings,
    })
}

#[cfg(test)]
mod tests;
