//! A toolstack in a file: the devices of guests that no other toolstack describes (dom0less, Xen before 4.18, a guest whose
//! configuration nobody may change).
//!
//! A file says of each device what libxl says in xenstore. When the guest of its name comes up, that is written there, and is
//! what holds until the guest ends, whatever becomes of the file.

use crate::devices::{self, DeviceKind};
use crate::supervisor::Identity;
use crate::toolstack::libxl::{self, EntryForm, EntryKey, MAX_DEVICES};
use crate::toolstack::xenstore::{XenStore, XenStoreError};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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

/// The guest's interrupt controller in its device tree (`GUEST_PHANDLE_GIC`).
const GIC_PHANDLE: u32 = 65000;

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
    #[serde(default = "yes")]
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
        let mark = mark(guest);
        if store.read(&mark_path(guest.domid))?.as_deref() == Some(mark) {
            return Ok(());
        }
        // Of another guest of this domid, or of one that was not written to its end.
        store.remove(&guest_path(guest.domid))?;
        let devices = match trusted_name(store, guest.domid)? {
            Some(name) if !served => self.devices(&name)?,
            _ => Vec::new(),
        };
        for (device, devid) in devices.iter().zip(0..) {
            let key = EntryKey {
                form: EntryForm::File,
                devid,
            };
            let path = libxl::entry_path(guest.domid, key);
            let FileDevice {
                device_type,
                base,
                interrupt,
                grant_usage,
                settings,
            } = device;
            for (node, value) in [
                ("type", format!("virtio,device{device_type:x}")),
                ("base", format!("{base:#x}")),
                ("irq", interrupt.to_string()),
                ("grant_usage", u8::from(*grant_usage).to_string()),
                ("settings", json(settings)),
                // Last: with it the entry is there.
                ("state", "1".to_owned()),
            ] {
                store.write(&format!("{path}/{node}"), &value)?;
            }
        }
        // Last: with it the guest is not looked at again.
        store.write(&mark_path(guest.domid), mark)?;
        Ok(())
    }
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
fn mark(guest: &Identity) -> &str {
    guest.vm.as_deref().unwrap_or("none")
}

fn mark_path(domid: u16) -> String {
    format!("{}/guest", guest_path(domid))
}

/// Forgets what was written of guests that are gone, which nobody has seen go.
///
/// # Errors
///
/// [`XenStoreError`].
pub(crate) fn sweep(
    store: &mut XenStore,
    mut identify: impl FnMut(&mut XenStore, u16) -> Result<Option<Identity>, XenStoreError>,
) -> Result<(), XenStoreError> {
    for domid in store.directory(&root())? {
        let guest = match domid.parse() {
            Ok(domid) => identify(store, domid)?,
            Err(_) => None,
        };
        let written = store.read(&format!("{}/{domid}/guest", root()))?;
        if guest.is_none_or(|guest| written.as_deref() != Some(mark(&guest))) {
            store.remove(&format!("{}/{domid}", root()))?;
        }
    }
    Ok(())
}

/// Forgets what was written of a guest that is gone. Another one may have its domid already.
///
/// # Errors
///
/// [`XenStoreError`].
pub(crate) fn forget(store: &mut XenStore, guest: &Identity) -> Result<(), XenStoreError> {
    if store.read(&mark_path(guest.domid))?.as_deref() == Some(mark(guest)) {
        store.remove(&guest_path(guest.domid))?;
    }
    Ok(())
}

fn root() -> String {
    format!("backend/{}", EntryForm::File.directory())
}

fn guest_path(domid: u16) -> String {
    format!("{}/{domid}", root())
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
    let kind = devices::kinds().find(|kind| kind.name() == name);
    let kind = kind.ok_or_else(|| {
        let names: Vec<_> = devices::kinds().map(DeviceKind::name).collect();
        format!("type = {name:?} is none of {}", names.join(", "))
    })?;
    kind.check_settings(&settings)
        .map_err(|error| format!("{error:#}"))?;
    let len = json(&settings).len();
    if len > MAX_SETTINGS {
        return Err(format!(
            "its settings take {len} bytes, and xenstore has room for {MAX_SETTINGS}"
        ));
    }
    let number = u32::try_from(index).expect("few devices");
    let base = base.unwrap_or(FIRST_BASE + u64::from(number) * libxl::PAGE_LEN);
    let interrupt = interrupt.unwrap_or(FIRST_INTERRUPT + number);
    let range = libxl::page(base).ok_or_else(|| {
        format!(
            "base = {base:#x} is no multiple of {:#x} from there on",
            libxl::PAGE_LEN
        )
    })?;
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

/// The source of the partial device tree with which a guest finds `devices`, for `device_tree=` of xl and the like.
pub fn device_tree(name: &str, devices: &[FileDevice]) -> String {
    let interrupts: BTreeSet<u32> = devices.iter().map(|device| device.interrupt).collect();
    let shared = interrupts.last().map_or(0, |last| last + 1 - FIRST_SHARED);
    let mut text = format!(
        "/* The virtio devices of guest {name}, by {DIRECTORY}/{name}.toml.\n\
         \x20* dtc -O dtb -o {name}.dtb FILE; in its xl file: device_tree = \"{name}.dtb\", and nr_spis = {shared} (Xen 4.19\n\
         \x20* and later; before, vuart = \"sbsa_uart\" gives the guest 32 shared interrupts). */\n\
         /dts-v1/;\n\n/ {{\n    #address-cells = <2>;\n    #size-cells = <2>;\n\n    passthrough {{\n        \
         compatible = \"simple-bus\";\n        ranges;\n        #address-cells = <2>;\n        #size-cells = <2>;\n"
    );
    if devices.iter().any(|device| device.grant_usage) {
        text.push_str(
            "\n        grants: xen_iommu {\n            compatible = \"xen,grant-dma\";\n            \
             #iommu-cells = <1>;\n        };\n",
        );
    }
    for device in devices {
        let FileDevice {
            base, interrupt, ..
        } = device;
        let (high, low) = (base >> 32, base & u64::from(u32::MAX));
        let number = interrupt - FIRST_SHARED;
        // 0: a shared interrupt; 1: its rising edges.
        let _ = write!(
            text,
            "\n        virtio@{base:x} {{\n            compatible = \"virtio,mmio\";\n            \
             reg = <{high:#x} {low:#x} 0x0 {:#x}>;\n            interrupt-parent = <{GIC_PHANDLE}>;\n            \
             interrupts = <0 {number} 1>;\n            dma-coherent;\n",
            libxl::PAGE_LEN
        );
        if device.grant_usage {
            // 0: the domain that the pages are granted to.
            text.push_str("            iommus = <&grants 0>;\n");
        }
        text.push_str("        };\n");
    }
    text.push_str("    };\n};\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::xenstore::sim::SimStore;

    const FILE: &str = "[[device]]\ntype = \"blk\"\npath = \"/dev/vg/ivi\"\n\n[[device]]\ntype = \"rng\"\n\
                        grant-usage = false\nbase = 0x2100000\ninterrupt = 50\nbytes-per-second = 4096\n";

    fn files(text: &str) -> (tempfile::TempDir, GuestFiles) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ivi.toml"), text).unwrap();
        let files = GuestFiles::new(directory.path());
        (directory, files)
    }

    #[test]
    fn a_guest_has_the_devices_of_the_file_of_its_name() {
        let (_directory, files) = files(FILE);
        assert_eq!(files.names(), ["ivi"]);
        let devices = files.devices("ivi").unwrap();
        let places = devices.iter().map(|device| {
            (
                device.device_type,
                device.base,
                device.interrupt,
                device.grant_usage,
            )
        });
        assert_eq!(
            places.collect::<Vec<_>>(),
            [(2, 0x200_0000, 33, true), (4, 0x210_0000, 50, false)]
        );
        for other in ["rtos", "", "../ivi", ".", "a/b"] {
            assert_eq!(files.devices(other).unwrap(), [], "{other}");
        }
        let none = GuestFiles::new(Path::new("/nonexistent"));
        assert_eq!(none.devices("ivi").unwrap(), []);
        assert!(none.names().is_empty());
    }

    #[test]
    fn what_cannot_be_served_is_named_with_its_file() {
        let disk = "[[device]]\ntype = \"blk\"\npath = \"/a\"\n";
        for (text, expected) in [
            ("[[device]]\n", "missing field `type`"),
            ("[[devices]]\n", "unknown field `devices`"),
            (
                "[[device]]\ntype = \"gpu\"\n",
                "type = \"gpu\" is none of blk, rng",
            ),
            (
                "[[device]]\ntype = \"blk\"\n",
                "number 0: missing field `path`",
            ),
            (
                "[[device]]\ntype = \"blk\"\npath = \"a\"\n",
                "no absolute path",
            ),
            (
                "[[device]]\ntype = \"rng\"\npath = \"/a\"\n",
                "unknown field `path`",
            ),
            (
                &format!("{disk}base = 0x2000100\n"),
                "base = 0x2000100 is no multiple",
            ),
            (&format!("{disk}base = 0\n"), "base = 0x0"),
            (
                &format!("{disk}interrupt = 31\n"),
                "interrupt = 31 is no shared one",
            ),
            (
                &format!("{disk}{disk}base = 0x2000000\n"),
                "number 1: base = 0x2000000 is another",
            ),
            (
                &format!("{disk}{disk}interrupt = 33\n"),
                "number 1: interrupt = 33 is another",
            ),
            (
                &disk.replace("/a", &format!("/{}", "a".repeat(4000))),
                "xenstore has room for 3500",
            ),
            (&disk.repeat(12), "12 devices, and a guest can have 11"),
        ] {
            let (_directory, files) = files(text);
            let error = files.devices("ivi").unwrap_err().to_string();
            assert!(
                error.contains("ivi.toml") && error.contains(expected),
                "{text}: {error}"
            );
        }
    }

    fn guest(domid: u16, vm: &str) -> Identity {
        Identity {
            domid,
            vm: Some(format!("/vm/{vm}")),
        }
    }

    #[test]
    fn what_a_file_says_is_written_once_and_outlives_it() {
        let (directory, files) = files(FILE);
        let (sim, mut store) = SimStore::new();
        let count = |store: &mut XenStore| libxl::entries(store).unwrap().len();
        let [ivi, rtos] = [guest(3, "a"), guest(4, "b")];
        sim.introduce(3, "ivi", "a");
        sim.introduce(4, "rtos", "b");
        files.announce(&mut store, &ivi, false).unwrap();
        files.announce(&mut store, &rtos, false).unwrap();
        assert_eq!(count(&mut store), 2);
        let key = |devid| EntryKey {
            form: EntryForm::File,
            devid,
        };
        let entry = libxl::read_entry(&mut store, 3, key(1)).unwrap();
        assert_eq!(
            (entry.base, entry.irq, entry.grant_usage),
            (0x210_0000, 50, false)
        );
        let libxl::EntryKind::Virtio {
            device_type,
            settings,
        } = entry.kind
        else {
            panic!("{:?}", entry.kind)
        };
        assert_eq!(device_type, 4);
        assert_eq!(
            settings.unwrap()["bytes-per-second"].as_integer(),
            Some(4096)
        );
        // Neither a file that goes nor one that comes later is a running guest's.
        let later = directory.path().join("rtos.toml");
        fs::rename(directory.path().join("ivi.toml"), later).unwrap();
        for guest in [&ivi, &rtos] {
            files.announce(&mut store, guest, false).unwrap();
        }
        sweep(&mut store, |_, domid| {
            Ok([&ivi, &rtos]
                .into_iter()
                .find(|guest| guest.domid == domid)
                .cloned())
        })
        .unwrap();
        assert_eq!(count(&mut store), 2);
        // The next guest of a domid is another one, and what was the last one's does not go with it.
        let next = guest(3, "c");
        sim.introduce(3, "rtos", "c");
        files.announce(&mut store, &next, false).unwrap();
        forget(&mut store, &ivi).unwrap();
        assert_eq!(count(&mut store), 2);
        sweep(&mut store, |_, _| Ok(Some(ivi.clone()))).unwrap();
        assert_eq!(count(&mut store), 0);
    }

    #[test]
    fn a_guest_that_was_served_before_gets_nothing_new() {
        let (_directory, files) = files(FILE);
        let (sim, mut store) = SimStore::new();
        sim.introduce(3, "ivi", "a");
        for served in [true, false] {
            files.announce(&mut store, &guest(3, "a"), served).unwrap();
            assert!(libxl::entries(&mut store).unwrap().is_empty());
        }
    }

    /// Whoever has the name has the devices.
    #[test]
    fn a_guest_cannot_take_another_ones_name() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["ivi", "dom0less-3", "dom0less-4"] {
            fs::write(directory.path().join(format!("{name}.toml")), FILE).unwrap();
        }
        let files = GuestFiles::new(directory.path());
        for (name, count) in [("ivi", 0), ("dom0less-4", 0), ("dom0less-3", 2)] {
            let (sim, mut store) = SimStore::new();
            sim.introduce_owner(3, name, "a");
            files.announce(&mut store, &guest(3, "a"), false).unwrap();
            let entries = libxl::entries(&mut store).unwrap();
            assert_eq!(entries.len(), count, "{name}");
        }
    }

    #[test]
    fn what_was_not_written_to_its_end_is_written_again() {
        let (_directory, files) = files(FILE);
        let (sim, mut store) = SimStore::new();
        sim.introduce(3, "ivi", "a");
        // As far as a process had got that was killed.
        sim.write("backend/virtio_file/3/0/type", "virtio,device2");
        files.announce(&mut store, &guest(3, "a"), false).unwrap();
        assert_eq!(libxl::entries(&mut store).unwrap().len(), 2);
    }

    #[test]
    fn the_page_on_configuration_has_a_file_that_the_service_takes() {
        let page = include_str!("../../../docs/configuration.md");
        let section = page.split("## In a file for the guest").nth(1).unwrap();
        let example = section.split("| key").next().unwrap();
        let example = example.lines().filter_map(|line| line.strip_prefix("    "));
        let devices = parse(
            Path::new("ivi.toml"),
            &example.collect::<Vec<_>>().join("\n"),
        )
        .unwrap();
        let defaults =
            "[[device]]\ntype = \"blk\"\npath = \"/dev/vg/guest\"\n[[device]]\ntype = \"rng\"\n";
        assert_eq!(devices, parse(Path::new("ivi.toml"), defaults).unwrap());
    }

    #[test]
    fn a_device_tree_has_what_a_guest_must_know() {
        let (_directory, files) = files(FILE);
        let tree = device_tree("ivi", &files.devices("ivi").unwrap());
        for expected in [
            "nr_spis = 19 ",
            "xen,grant-dma",
            "virtio@2000000",
            "reg = <0x0 0x2000000 0x0 0x200>;",
            "interrupts = <0 1 1>;",
            "virtio@2100000",
            "interrupts = <0 18 1>;",
        ] {
            assert!(tree.contains(expected), "{expected}: {tree}");
        }
        assert_eq!(tree.matches("iommus").count(), 1, "{tree}");
        let frames = files.devices("ivi").unwrap().split_off(1);
        assert!(!device_tree("ivi", &frames).contains("grant"));
    }
}
