//! `xen-virtioctl check`: what is wrong with the virtio devices of an xl file, before `xl create` says
//! less about it.
//!
//! libxl refuses a disk that is a directory with "no suitable backend for disk xvda", and knows nothing of
//! what xen-virtiod will make of the rest.

mod c_number;
mod disk;
mod own_line;
mod standalone;
mod syntax;
mod vdev;
mod virtio;
mod warnings;

use crate::config::{CONFIG_PATH, Config};
use crate::devices::{self, SOCKET, Service, blk};
use crate::guest_state::Backing;
use crate::text::without_controls;
use crate::toolstack::libxl::MAX_DEVICES;
pub use disk::DiskLine;
pub use own_line::OwnLine;
use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
pub use syntax::{Settings, Value, parse as parse_file};
use virtio::VirtioLine;
use warnings::ListedDisk;
pub(crate) use warnings::of_xl;
use xen_virtio_backend::DeviceType;
use xen_virtio_backend::blk::{Disk, SECTOR};

/// The list of a file that is ours.
pub const OWN_LIST: &str = "xen_virtio";

/// A device that xen-virtiod would serve.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// As the file names it: `disk xvda`.
    pub name: String,
    /// The name of its kind.
    pub kind: &'static str,
    pub settings: toml::Table,
    pub grants: bool,
}

/// What was found in an xl file.
#[derive(Debug, Default, PartialEq)]
pub struct Findings {
    /// In the order in which the guest finds them.
    pub devices: Vec<Planned>,
    /// Devices that xen-virtiod would serve as they are.
    pub good: Vec<String>,
    /// What the guest may still not find, or lose.
    pub warnings: Vec<String>,
    pub problems: Vec<String>,
}

impl Findings {
    /// Whether all that is wrong is that it has none of our devices.
    pub fn is_without_devices(&self) -> bool {
        self.good.is_empty() && self.problems == [NO_DEVICE]
    }

    fn take(&mut self, name: &str, result: Result<Served, String>) {
        let about = |text| without_controls(format!("{name}: {text}").chars());
        match result {
            Ok(served) => {
                self.good.push(about(served.text));
                self.warnings.extend(served.warnings.into_iter().map(about));
                self.devices.push(Planned {
                    name: without_controls(name.chars()),
                    kind: served.kind,
                    settings: served.settings,
                    grants: served.grants,
                });
            }
            Err(problem) => self.problems.push(about(problem)),
        }
    }

    fn warn(&mut self, warning: Option<String>) {
        let warning = warning.map(|text| without_controls(text.chars()));
        self.warnings.extend(warning);
    }
}

/// A device that would be served.
struct Served {
    /// What the guest would get.
    text: String,
    warnings: Vec<String>,
    kind: &'static str,
    settings: toml::Table,
    grants: bool,
}

/// Checks every virtio device in `text`, an xl file.
pub fn check(text: &[u8], config: &Config) -> Findings {
    let mut findings = Findings::default();
    if let Err(problem) = check_file(text, config, &mut findings) {
        findings.problems.push(without_controls(problem.chars()));
    } else if findings.good.is_empty() && findings.problems.is_empty() {
        findings.problems.push(NO_DEVICE.to_owned());
    }
    findings
}

const NO_DEVICE: &str =
    "no virtio device: no disk with specification=virtio, and no virtio = [ … ]";

/// The name of the guest of the xl file `text`, if it can be read and has one.
pub fn name(text: &[u8]) -> Option<String> {
    let settings = parse_file(text).ok()?;
    settings.text("name").map(str::to_owned)
}

/// What the xl file `text` lacks of what a guest wants whose devices are in a file of its own.
pub fn warnings_of_guest_file(text: &[u8]) -> Vec<String> {
    let Ok(settings) = parse_file(text) else {
        return Vec::new();
    };
    let mut warnings = Vec::new();
    if settings.get("device_tree").is_none() {
        warnings.push(
            "no device_tree = \"…\", without which the guest does not find its devices: xen-virtioctl device-tree"
                .to_owned(),
        );
    }
    if settings.get("nr_spis").is_none() && settings.get("vuart").is_none() {
        warnings.push(
            "neither nr_spis = … (Xen 4.19 and later) nor vuart = \"sbsa_uart\": the guest has no shared interrupts for its \
             devices"
                .to_owned(),
        );
    }
    warnings
}

/// # Errors
///
/// What keeps xl from reading the file.
fn check_file(text: &[u8], config: &Config, findings: &mut Findings) -> Result<(), String> {
    let settings = parse_file(text)?;
    let mut disks = Disks::new(config);
    let mut listed = Vec::new();
    let (mut disk_count, mut other_count, mut grants) = (0, 0, false);
    for line in list(&settings, "disk", findings)? {
        let disk = match DiskLine::parse(line) {
            Ok(disk) => disk,
            Err(problem) => {
                findings.take(&format!("disk {line:?}"), Err(problem));
                continue;
            }
        };
        let is_virtio = disk.is_virtio();
        listed.push(ListedDisk {
            number: vdev::number(disk.vdev()),
            is_virtio,
        });
        if is_virtio {
            let name = match disk.vdev() {
                "" => format!("disk {line:?}"),
                vdev => format!("disk {vdev}"),
            };
            disk_count += usize::from(disk.specification() == Some("virtio"));
            grants |= disk.grants() == Some(true);
            findings.take(&name, disks.check(&disk));
        }
    }
    let guest = settings.text("name");
    for (index, line) in (0..).zip(list(&settings, "virtio", findings)?) {
        let name = format!("virtio {index}");
        let result = VirtioLine::parse(line).and_then(|device| {
            other_count += usize::from(device.is_mmio());
            grants |= device.grants();
            let device_type = device.device_type()?;
            let configured = guest.and_then(|guest| config.device(guest, index));
            let none = toml::Table::new();
            let settings = configured.map_or(&none, |device| &device.settings);
            let service = Service::of(settings);
            let kind = devices::kind(device_type, service).map_err(|error| error.to_string())?;
            if device_type != DeviceType::BLOCK.0 || service != Service::Own {
                kind.check_settings(settings)
                    .map_err(|error| format!("[[virtio]] in {CONFIG_PATH}: {error:#}"))?;
                return Ok(Served {
                    text: format!("{}; touches {}", kind.name(), touched(device.grants())),
                    warnings: Vec::new(),
                    kind: kind.name(),
                    settings: settings.clone(),
                    grants: device.grants(),
                });
            }
            let (path, disk) = configured_disk(guest, index, config)?;
            listed.push(ListedDisk {
                number: None,
                is_virtio: true,
            });
            disks.share(&name, &path, &disk)?;
            Ok(describe(&path, &disk, device.grants()))
        });
        findings.take(&name, result);
    }
    let mut sockets = BTreeSet::new();
    for line in list(&settings, OWN_LIST, findings)? {
        other_count += 1;
        let device = OwnLine::parse(line).map_err(|problem| of_line(text, line, &problem));
        let served = device.and_then(|device| {
            grants |= device.grants();
            let mut warnings = device.warnings();
            if let Some(socket) = device.settings.get(SOCKET).and_then(toml::Value::as_str)
                && !sockets.insert(socket.to_owned())
            {
                warnings.push(format!(
                    "socket = {socket} is another device's too: a back-end serves one"
                ));
            }
            if device.is_own_disk()
                && let Ok(settings) = devices::parse_settings::<blk::Settings>(&device.settings)
                && let Ok(disk) = open(&settings.path, settings.read_only)
            {
                disks.share(line, &settings.path, &disk)?;
                warnings.extend(warnings::of_image(&settings.path, &disk));
            }
            Ok(Served {
                text: format!("{}; touches {}", device.kind, touched(device.grants())),
                warnings,
                kind: device.kind,
                grants: device.grants(),
                settings: device.settings,
            })
        });
        findings.take(&format!("{OWN_LIST} {line:?}"), served);
    }
    let count = disk_count + other_count;
    if count > MAX_DEVICES {
        findings.problems.push(format!(
            "{count} virtio devices, {disk_count} of disk = [ … ] and {other_count} of virtio = [ … ]: libxl \
             has {MAX_DEVICES} virtio interrupts a guest, so remove {}",
            count - MAX_DEVICES
        ));
    }
    if grants || other_count > 0 {
        findings.warn(xen_version().and_then(of_xl));
    }
    findings.warn(warnings::of_last_byte(&settings));
    findings.warn(warnings::of_root(&settings, &listed));
    if grants {
        findings.warn(warnings::of_boot_loader(&settings));
    }
    Ok(())
}

/// Xen's version, major and minor, in a domain of it.
pub(crate) fn xen_version() -> Option<(u32, u32)> {
    let number = |name| {
        let text = std::fs::read_to_string(Path::new("/sys/hypervisor/version").join(name));
        text.ok()?.trim().parse().ok()
    };
    Some((number("major")?, number("minor")?))
}

/// `problem`, with the line of the file `text` that has `item`.
pub(crate) fn of_line(text: &[u8], item: &str, problem: &str) -> String {
    let mut places = text.windows(item.len().max(1));
    let place = places.position(|place| place == item.as_bytes());
    match place {
        Some(place) => {
            let before = text[..place].iter().filter(|byte| **byte == b'\n');
            format!("line {}: {problem}", before.count() + 1)
        }
        None => problem.to_owned(),
    }
}

/// The texts of the list `name`.
///
/// # Errors
///
/// If it is no list of texts.
pub(crate) fn texts<'a>(settings: &'a Settings, name: &str) -> Result<Vec<&'a str>, String> {
    let mut findings = Findings::default();
    let texts = list(settings, name, &mut findings)?;
    match findings.problems.pop() {
        Some(problem) => Err(problem),
        None => Ok(texts),
    }
}

/// The texts of the list `name`, as far as xl reads it.
///
/// # Errors
///
/// If it is no list.
fn list<'a>(
    settings: &'a Settings,
    name: &str,
    findings: &mut Findings,
) -> Result<Vec<&'a str>, String> {
    let list = match settings.get(name) {
        None => return Ok(Vec::new()),
        Some(Value::List(list)) => list,
        Some(Value::Single(text)) => {
            return Err(format!(
                "{name} = {text:?} is no list, and xl leaves it out: write {name} = [ {text:?} ]"
            ));
        }
    };
    let text = |value: &'a Value| match value {
        Value::Single(text) => Some(text.as_str()),
        Value::List(_) => None,
    };
    let texts: Vec<&str> = list.iter().map_while(text).collect();
    if texts.len() < list.len() {
        findings.problems.push(format!(
            "{name} = [ … ] has a list as its item {}, and xl reads no further: take out the inner brackets",
            texts.len() + 1
        ));
    }
    Ok(texts)
}

/// The virtio disks so far.
struct Disks<'a> {
    config: &'a Config,
    numbers: BTreeSet<u32>,
    /// What they are in, their names, and whether the guest may write them.
    backings: Vec<(Backing, String, bool)>,
}

impl<'a> Disks<'a> {
    fn new(config: &'a Config) -> Self {
        Self {
            config,
            numbers: BTreeSet::new(),
            backings: Vec::new(),
        }
    }

    /// # Errors
    ///
    /// What keeps `disk` from being served, or should.
    fn check(&mut self, disk: &DiskLine) -> Result<Served, String> {
        let path = Path::new(disk.path()?);
        disk.check_standalone()?;
        let vdev = disk.vdev();
        if vdev.is_empty() {
            return Err("has no vdev=, like vdev=xvda".to_owned());
        }
        let number = vdev::number(vdev)
            .ok_or_else(|| format!("vdev={vdev} is no device that xl knows, like xvda"))?;
        if !self.numbers.insert(number) {
            return Err("is there twice".to_owned());
        }
        let opened = open(path, !disk.is_writable())?;
        self.share(vdev, path, &opened)?;
        Ok(describe(path, &opened, disk.grants() == Some(true)))
    }

    /// Adds the disk `name`.
    ///
    /// # Errors
    ///
    /// If another one is in the same file, and one of them is written.
    fn share(&mut self, name: &str, path: &Path, disk: &Disk) -> Result<(), String> {
        let backing = Backing::of(disk.file()).map_err(|error| error.to_string())?;
        let writes = !disk.read_only();
        let shares = |(other, _, other_writes): &&(_, _, bool)| {
            *other == backing && (*other_writes || writes)
        };
        if let Some((_, other, _)) = self.backings.iter().find(shares)
            && !self.config.is_shared(path)
        {
            return Err(format!(
                "{} is the disk {other} too: what is written to one of them is not known of the other",
                path.display()
            ));
        }
        self.backings.push((backing, name.to_owned(), writes));
        Ok(())
    }
}

/// The disk that the configuration has for a device, and its path.
fn configured_disk(
    guest: Option<&str>,
    index: u32,
    config: &Config,
) -> Result<(PathBuf, Disk), String> {
    let guest = guest.ok_or("the file has no name = \"…\", which the configuration would go by")?;
    let configured = config.device(guest, index).ok_or_else(|| {
        format!("{CONFIG_PATH} has no [[virtio]] with guest = {guest:?} and index = {index}")
    })?;
    let settings: blk::Settings = devices::parse_settings(&configured.settings)
        .map_err(|error| format!("[[virtio]] in {CONFIG_PATH}: {error:#}"))?;
    let disk = open(&settings.path, settings.read_only)?;
    Ok((settings.path, disk))
}

fn open(path: &Path, read_only: bool) -> Result<Disk, String> {
    Disk::open(path, read_only).map_err(|error| {
        let source = error.source().map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    })
}

/// What of the guest's memory a device could touch.
fn touched(grants: bool) -> &'static str {
    if grants {
        "granted pages only"
    } else {
        "ANY page of the guest: add grant_usage=1 unless that is meant"
    }
}

/// What the guest would get of the disk at `path`.
fn describe(path: &Path, disk: &Disk, grants: bool) -> Served {
    let warnings = warnings::of_image(path, disk);
    let how = if disk.read_only() {
        "read-only"
    } else {
        "read-write"
    };
    let memory = touched(grants);
    let (path, bytes) = (path.display(), disk.bytes());
    let rest = disk.file().metadata().map_or(0, |file| file.len() % SECTOR);
    let rest = match rest {
        0 => String::new(),
        rest => format!(" (and {rest} more, which are no whole sector and stay unused)"),
    };
    let text = format!("{path}, {bytes} bytes{rest}, {how}; touches {memory}");
    Served {
        text,
        warnings,
        kind: blk::NAME,
        settings: toml::Table::new(),
        grants,
    }
}

#[cfg(test)]
mod tests;
