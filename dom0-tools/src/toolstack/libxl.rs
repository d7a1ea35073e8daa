//! What libxl writes to xenstore for a virtio device, and how it is answered.

use crate::toolstack::xenstore::{XenStore, XenStoreError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use xen_virtio_backend::DeviceType;
use xen_virtio_transport::MmioRange;

/// Bytes of a device's page (`VIRTIO_MMIO_DEV_SIZE` in libxl).
pub(crate) const PAGE_LEN: u64 = 0x200;

/// Virtio devices that a guest can have: libxl has the interrupts 33 to 43 for them (`GUEST_VIRTIO_MMIO_SPI_FIRST` to `_LAST`).
pub const MAX_DEVICES: usize = 11;

/// Which form an entry has: one of libxl's two, or of our two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryForm {
    /// `disk = [ "specification=virtio, …" ]`
    Disk,
    /// `virtio = [ "type=virtio,device…, …" ]`
    Virtio,
    /// A guest's own file, see [`guest_file`](crate::toolstack::guest_file).
    File,
    /// Somebody's word to us while the guest runs: `xen-virtioctl attach`.
    Attached,
}

impl EntryForm {
    pub const ALL: [Self; 4] = [Self::Disk, Self::Virtio, Self::File, Self::Attached];

    /// The name of its directory among the backends.
    pub fn directory(self) -> &'static str {
        match self {
            Self::Disk => "virtio_disk",
            Self::Virtio => "virtio",
            Self::File => "virtio_file",
            Self::Attached => "virtio_attached",
        }
    }
}

/// Names an entry of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EntryKey {
    pub form: EntryForm,
    pub devid: u32,
}

impl EntryKey {
    /// The key as a number of 40 bits, which stands in state files.
    pub(crate) fn number(self) -> u64 {
        let form = match self.form {
            EntryForm::Disk => 0,
            EntryForm::Virtio => 1,
            EntryForm::File => 2,
            EntryForm::Attached => 3,
        };
        form << 32 | u64::from(self.devid)
    }

    /// Whether `text` names an entry, as its `Display` does.
    pub(crate) fn is_name(text: &str) -> bool {
        text.split_once('/').is_some_and(|(directory, devid)| {
            EntryForm::ALL
                .map(EntryForm::directory)
                .contains(&directory)
                && devid
                    .parse::<u32>()
                    .is_ok_and(|number| number.to_string() == devid)
        })
    }
}

impl fmt::Display for EntryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.form.directory(), self.devid)
    }
}

/// `XenbusState` (`xen/io/xenbus.h`), as far as libxl uses it for these devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XenbusState {
    Initialising = 1,
    InitWait = 2,
    Closing = 5,
    Closed = 6,
}

impl XenbusState {
    /// The state that an entry's node says. One that is none of these is a served entry's: somebody else has written it.
    fn read(value: &str) -> Self {
        match value.trim().parse() {
            Ok(1) => Self::Initialising,
            Ok(5) => Self::Closing,
            Ok(6..=u32::MAX) => Self::Closed,
            _ => Self::InitWait,
        }
    }
}

/// The page of a device at `base`, if there can be one.
pub(crate) fn page(base: u64) -> Option<MmioRange> {
    let len = PAGE_LEN;
    let is_page = base != 0 && base.is_multiple_of(len) && base.checked_add(len).is_some();
    is_page.then_some(MmioRange { base, len })
}

/// An entry that libxl has written.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub base: u64,
    pub irq: u32,
    pub grant_usage: bool,
    pub kind: EntryKind,
}

impl Entry {
    pub fn range(&self) -> MmioRange {
        page(self.base).expect("checked when it was read")
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum EntryKind {
    Disk {
        path: PathBuf,
        read_only: bool,
        vdev: String,
    },
    /// A virtio device.
    Virtio {
        /// A virtio device type number (virtio 1.3, section 5).
        device_type: u32,
        /// What it is made of, if its guest's file says that; our configuration may, if not.
        settings: Option<toml::Table>,
    },
}

impl EntryKind {
    /// A virtio device type number.
    pub fn device_type(&self) -> u32 {
        match self {
            Self::Disk { .. } => DeviceType::BLOCK.0,
            Self::Virtio { device_type, .. } => *device_type,
        }
    }
}

/// What is wrong with an entry.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    #[error(transparent)]
    XenStore(#[from] XenStoreError),
    #[error("xenstore has no {path}, which libxl of Xen 4.18 and later writes")]
    Missing { path: String },
    #[error("xenstore's {path} is {value:?}, which is not {expected}")]
    Value {
        path: String,
        value: String,
        expected: &'static str,
    },
}

/// The directory of an entry, relative to the backend domain's home.
pub fn entry_path(domid: u16, key: EntryKey) -> String {
    format!("backend/{}/{domid}/{}", key.form.directory(), key.devid)
}

/// The guest and entry that a changed `path` belongs to, if it names one.
pub fn parse_path(path: &str) -> Option<(u16, EntryKey)> {
    let mut parts = path
        .split('/')
        .skip_while(|part| *part != "backend")
        .skip(1);
    let directory = parts.next()?;
    let form = EntryForm::ALL
        .into_iter()
        .find(|form| form.directory() == directory)?;
    let domid = parts.next()?.parse().ok()?;
    let devid = parts.next()?.parse().ok()?;
    Some((domid, EntryKey { form, devid }))
}

/// Every entry that there is.
///
/// # Errors
///
/// [`XenStoreError`].
pub fn entries(store: &mut XenStore) -> Result<Vec<(u16, EntryKey)>, XenStoreError> {
    let mut found = Vec::new();
    for form in EntryForm::ALL {
        let directory = format!("backend/{}", form.directory());
        for domid in store.directory(&directory)? {
            for devid in store.directory(&format!("{directory}/{domid}"))? {
                found.extend(parse_path(&format!("{directory}/{domid}/{devid}")));
            }
        }
    }
    Ok(found)
}

/// The state of an entry; `None` if it is gone.
///
/// # Errors
///
/// [`XenStoreError`].
pub fn read_state(
    store: &mut XenStore,
    domid: u16,
    key: EntryKey,
) -> Result<Option<XenbusState>, XenStoreError> {
    let state = store.read(&format!("{}/state", entry_path(domid, key)))?;
    Ok(state.as_deref().map(XenbusState::read))
}

/// Tells libxl that an entry is served, unless it knows.
///
/// # Errors
///
/// [`XenStoreError`].
pub fn tell_ready(store: &mut XenStore, domid: u16, key: EntryKey) -> Result<(), XenStoreError> {
    change_state(
        store,
        domid,
        key,
        XenbusState::Initialising,
        XenbusState::InitWait,
    )
}

/// Tells libxl that an entry that it wants closed is closed.
///
/// # Errors
///
/// [`XenStoreError`].
pub fn tell_closed(store: &mut XenStore, domid: u16, key: EntryKey) -> Result<(), XenStoreError> {
    change_state(store, domid, key, XenbusState::Closing, XenbusState::Closed)
}

/// Leaves an entry alone that is in another state than `from`: libxl has removed it, which a write would undo, or
/// another one is in its place.
pub(super) fn change_state(
    store: &mut XenStore,
    domid: u16,
    key: EntryKey,
    from: XenbusState,
    to: XenbusState,
) -> Result<(), XenStoreError> {
    if read_state(store, domid, key)? == Some(from) {
        let path = format!("{}/state", entry_path(domid, key));
        store.write(&path, &(to as u32).to_string())?;
    }
    Ok(())
}

/// Reads an entry.
///
/// # Errors
///
/// [`EntryError`], which names the node that is missing or wrong.
pub fn read_entry(store: &mut XenStore, domid: u16, key: EntryKey) -> Result<Entry, EntryError> {
    let path = entry_path(domid, key);
    let mut node = Nodes { store, path: &path };
    let transport = node.optional("transport")?;
    if transport.is_some_and(|transport| transport != "mmio") {
        return Err(node.wrong("transport", "mmio, the only transport there is on Arm"));
    }
    let base = node.number("base")?;
    if page(base).is_none() {
        return Err(node.wrong("base", "the address of a device's page"));
    }
    let irq = u32::try_from(node.number("irq")?)
        .ok()
        .filter(|irq| (32..1020).contains(irq))
        .ok_or_else(|| node.wrong("irq", "a shared peripheral interrupt (32 to 1019)"))?;
    let grant_usage = match node.optional("grant_usage")?.as_deref() {
        None | Some("0") => false,
        Some("1") => true,
        Some(_) => return Err(node.wrong("grant_usage", "0 or 1")),
    };
    let kind = match key.form {
        EntryForm::Disk => EntryKind::Disk {
            path: node.required("params")?.into(),
            read_only: node.required("mode")? != "w",
            vdev: node.optional("dev")?.unwrap_or_default(),
        },
        EntryForm::Virtio => EntryKind::Virtio {
            device_type: node.device_type()?,
            settings: None,
        },
        EntryForm::File | EntryForm::Attached => EntryKind::Virtio {
            device_type: node.device_type()?,
            settings: Some(node.settings()?),
        },
    };
    Ok(Entry {
        base,
        irq,
        grant_usage,
        kind,
    })
}

/// The nodes of one entry.
struct Nodes<'a> {
    store: &'a mut XenStore,
    path: &'a str,
}

impl Nodes<'_> {
    fn optional(&mut self, name: &str) -> Result<Option<String>, EntryError> {
        Ok(self.store.read(&format!("{}/{name}", self.path))?)
    }

    fn required(&mut self, name: &str) -> Result<String, EntryError> {
        self.optional(name)?.ok_or_else(|| EntryError::Missing {
            path: format!("{}/{name}", self.path),
        })
    }

    /// libxl writes some numbers in decimal and some in hexadecimal.
    fn number(&mut self, name: &str) -> Result<u64, EntryError> {
        let value = self.required(name)?;
        let number = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        number.map_err(|_| self.wrong(name, "a number"))
    }

    /// `virtio,device` and the type in hexadecimal, as a device tree has it.
    fn device_type(&mut self) -> Result<u32, EntryError> {
        self.required("type")?
            .strip_prefix("virtio,device")
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .ok_or_else(|| self.wrong("type", "virtio,device and a type number in hexadecimal"))
    }

    /// As our own service has written them.
    fn settings(&mut self) -> Result<toml::Table, EntryError> {
        let text = self.required("settings")?;
        serde_json::from_str(&text).map_err(|_| self.wrong("settings", "a table in JSON"))
    }

    fn wrong(&mut self, name: &str, expected: &'static str) -> EntryError {
        let path = format!("{}/{name}", self.path);
        let value = self.store.read(&path).ok().flatten().unwrap_or_default();
        EntryError::Value {
            path,
            value,
            expected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_display_says_is_a_name() {
        for form in EntryForm::ALL {
            let name = EntryKey { form, devid: 51712 }.to_string();
            assert!(EntryKey::is_name(&name), "{name}");
        }
        for text in [
            "virtio",
            "virtio/",
            "virtio/x",
            "virtio/+1",
            "virtio/01",
            "vbd/0",
            "virtio/4294967296",
        ] {
            assert!(!EntryKey::is_name(text), "{text}");
        }
    }

    #[test]
    fn a_path_names_its_entry_whatever_is_before_and_behind() {
        let disk = |devid| EntryKey {
            form: EntryForm::Disk,
            devid,
        };
        for (path, expected) in [
            (
                "/local/domain/0/backend/virtio_disk/3/51712/state",
                Some((3, disk(51712))),
            ),
            ("backend/virtio_disk/3/51712", Some((3, disk(51712)))),
            (
                "backend/virtio/7/0/type",
                Some((
                    7,
                    EntryKey {
                        form: EntryForm::Virtio,
                        devid: 0,
                    },
                )),
            ),
            ("backend/virtio_disk/3", None),
            ("backend/vbd/3/51712", None),
            ("backend/virtio_disk/70000/1", None),
            ("@releaseDomain", None),
        ] {
            assert_eq!(parse_path(path), expected, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_judged(path: String) {
            let _ = parse_path(&path);
        }

        #[test]
        fn a_path_made_is_a_path_parsed(domid: u16, devid: u32) {
            for form in EntryForm::ALL {
                let key = EntryKey { form, devid };
                prop_assert_eq!(parse_path(&entry_path(domid, key)), Some((domid, key)));
            }
        }
    }
}
