//! The kinds of devices: what the configuration says of one, what is opened for it with privilege, and how it is built in
//! the sandbox.

pub(crate) mod blk;
mod built;
pub(crate) mod console;
mod empty;
mod feature_names;
pub(crate) mod input;
mod kernel_vhost;
pub(crate) mod net;
mod opened;
mod order;
pub(crate) mod rate;
mod rng;
mod vhost_user;
pub(crate) mod vsock;

use crate::config::Config;
use crate::guest_state::Backing;
use crate::toolstack::Identity;
use crate::toolstack::libxl::{EntryKey, EntryKind};
use anyhow::{Context, Result, bail};
use blk::Uses;
pub(crate) use built::{Arriving, Building, Built, Control, NewDevice, Resources, SyscallRule};
pub(crate) use opened::{BackEnd, Listen, Opened, RegionSize};
pub(crate) use order::Changed;
pub use order::Order;
use order::{KEYS, PORTS};
use rustix::fs::{Mode, OFlags, open};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
pub(crate) use vhost_user::MAX_SHARED;
use vhost_user::image;
use xen_virtio_backend::DeviceType;

/// Every kind that we serve.
const KINDS: &[&dyn DeviceKind] = &[
    &blk::BlkKind,
    &console::ConsoleKind,
    &empty::EmptyKind,
    &input::InputKind,
    &net::NetKind,
    &rng::RngKind,
    &vsock::VsockKind,
];

/// Those that dom0's kernel serves.
const KERNEL_KINDS: &[&dyn DeviceKind] = &[&kernel_vhost::VsockKind, &kernel_vhost::NetKind];

/// Who carries out what a device is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// We do.
    Own,
    /// A vhost-user back-end does.
    BackEnd,
    /// dom0's kernel does.
    Kernel,
}

/// The setting that names a back-end's socket: a device that has it is served by a back-end.
pub(crate) const SOCKET: &str = "socket";

impl Service {
    /// That of a device with these settings.
    pub(crate) fn of(settings: &toml::Table) -> Self {
        let is_set = |key: &str| settings.get(key).and_then(toml::Value::as_bool) == Some(true);
        let format = settings.get(image::FORMAT);
        let is_foreign = format.is_some_and(|format| format.as_str() != Some(image::RAW));
        if settings.contains_key(SOCKET) || is_foreign {
            Self::BackEnd
        } else if settings.contains_key(vsock::LISTEN) {
            Self::Own
        } else if settings.contains_key(kernel_vhost::CID) || is_set(kernel_vhost::VHOST) {
            Self::Kernel
        } else {
            Self::Own
        }
    }

    /// That of a device of which this was [kept](Opened::kept).
    fn of_kept(kept: Option<&Value>) -> Self {
        let has = |key: &str| kept.is_some_and(|kept| kept.get(key).is_some());
        if has(SOCKET) {
            Self::BackEnd
        } else if has(vsock::LISTEN) {
            Self::Own
        } else if has(kernel_vhost::CID) || has(net::TAP) {
            Self::Kernel
        } else {
            Self::Own
        }
    }
}

/// A kind of device.
pub(crate) trait DeviceKind: Sync {
    fn device_type(&self) -> DeviceType;

    /// As `xen-virtioctl` shows it.
    fn name(&self) -> &'static str;

    /// The feature bits of its own that it may offer, with their names.
    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        &[]
    }

    /// What a device has that is served so, and no other one.
    fn needs(&self) -> Option<&'static str> {
        None
    }

    /// What a device with these settings will not be served for, as dom0 is now.
    fn warnings(&self, _settings: &toml::Table) -> Vec<String> {
        Vec::new()
    }

    /// The option of a guest's Linux that has its driver, if Linux has one.
    fn driver_option(&self) -> Option<&'static str>;

    /// Whether `settings`, of a `[[virtio]]` in the configuration or a `[[device]]` in a guest's file, can be those of such a
    /// device: without this, it has none.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        match settings.keys().next() {
            Some(key) => bail!(
                "unknown field `{key}`: a device of type {} has no settings",
                self.name()
            ),
            None => Ok(()),
        }
    }

    /// Bytes of its guest's state file that a device takes at most that was opened with this [spec](Opened::spec), see
    /// [`device_bytes`](crate::guest_state::device_bytes).
    fn state_bytes(&self, spec: &Value) -> usize;

    /// Opens what the device needs, with the supervisor's privilege. Nothing that the guest wrote is looked at.
    ///
    /// # Errors
    ///
    /// What keeps it from being served; [`Busy`] if that may go away by itself.
    fn open(&self, wanted: &Wanted<'_>, uses: &mut Uses) -> Result<Opened>;

    /// What can be changed of a device that runs, see [`Order::part`].
    fn parts(&self) -> &'static [&'static str] {
        &[]
    }

    /// What a device that runs changes to by `order`: `kept` is what was [kept](Opened::kept) of it, and `backing` what it is
    /// in.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    fn change(
        &self,
        order: Order,
        _kept: Option<Value>,
        _backing: Option<Backing>,
    ) -> Result<Changed> {
        bail!("a device of type {} has no {}", self.name(), order.part())
    }

    /// Builds the device, in the sandbox.
    ///
    /// # Errors
    ///
    /// What keeps it from being served; [`Busy`] if that may go away by itself.
    fn build(&self, new: NewDevice<'_>, resources: &Resources<'_>) -> Result<Building>;

    /// The system calls that it makes in the sandbox, besides those of any worker.
    fn syscalls(&self) -> Vec<SyscallRule> {
        Vec::new()
    }
}

/// The kind of this virtio device type.
///
/// # Errors
///
/// If there is none.
pub(crate) fn kind(device_type: u32, service: Service) -> Result<&'static dyn DeviceKind> {
    let found = kinds(service).find(|kind| kind.device_type().0 == device_type);
    found.with_context(|| {
        let served = kinds(service)
            .map(|kind| format!("virtio,device{:x} ({})", kind.device_type().0, kind.name()));
        let served: Vec<_> = served.collect();
        let other = kinds(Service::BackEnd).any(|kind| kind.device_type().0 == device_type);
        let remedy = match other && service == Service::Own {
            true => ": name the socket of a vhost-user back-end that serves it (socket = \"…\")",
            false => "",
        };
        let how = match service {
            Service::Own => "serves",
            Service::BackEnd => "has, by back-ends,",
            Service::Kernel => "has, by dom0's kernel,",
        };
        format!(
            "this version {how} {}, and not virtio,device{device_type:x}{remedy}",
            served.join(", ")
        )
    })
}

/// The kind of this name that a device with these settings is of.
///
/// # Errors
///
/// The names that there are, or the settings that one of this name needs.
pub(crate) fn kind_named(
    name: &str,
    settings: &toml::Table,
) -> Result<&'static dyn DeviceKind, String> {
    let service = Service::of(settings);
    let found = kinds(service).find(|kind| kind.name() == name);
    found.ok_or_else(|| {
        let others: Vec<_> = all_kinds().filter(|kind| kind.name() == name).collect();
        let needs: Vec<_> = others.iter().filter_map(|kind| kind.needs()).collect();
        if !needs.is_empty() && service == Service::Own {
            let has: Vec<_> = settings.keys().map(String::as_str).collect();
            let has = match has.is_empty() {
                true => "nothing".to_owned(),
                false => has.join(", "),
            };
            return format!("{name} needs {}; it has {has}", needs.join(", or "));
        }
        let names: BTreeSet<_> = match others.is_empty() {
            true => all_kinds().map(DeviceKind::name).collect(),
            false => kinds(service).map(DeviceKind::name).collect(),
        };
        let names: Vec<_> = names.into_iter().collect();
        let with = match service {
            Service::Own => "",
            _ if others.is_empty() => "",
            Service::BackEnd => ", which back-ends serve at a socket",
            Service::Kernel => ", which dom0's kernel serves",
        };
        let hint = match name.contains(char::is_whitespace) {
            true => "; between settings is a comma",
            false => "",
        };
        format!("type {name:?} is none of {}{with}{hint}", names.join(", "))
    })
}

/// The kinds that are served so.
pub(crate) fn kinds(service: Service) -> impl Iterator<Item = &'static dyn DeviceKind> {
    let of = move |other| move |_: &&dyn DeviceKind| service == other;
    let back_ends = vhost_user::KINDS.iter().map(|kind| kind as _);
    let own = KINDS.iter().copied().filter(of(Service::Own));
    let kernel = KERNEL_KINDS.iter().copied().filter(of(Service::Kernel));
    own.chain(back_ends.filter(of(Service::BackEnd)))
        .chain(kernel)
}

/// Every kind that there is.
pub(crate) fn all_kinds() -> impl Iterator<Item = &'static dyn DeviceKind> {
    let services = [Service::Own, Service::BackEnd, Service::Kernel];
    services.into_iter().flat_map(kinds)
}

/// A device that a guest is to have.
pub(crate) struct Wanted<'a> {
    pub(crate) guest: &'a Identity,
    /// The guest's name.
    pub(crate) name: &'a str,
    pub(crate) key: EntryKey,
    /// What its toolstack says of it.
    pub(crate) source: &'a EntryKind,
    pub(crate) config: &'a Config,
    /// What was said of it when its guest was created.
    pub(crate) created: Option<toml::Table>,
    /// The guest has had it, from this service or an earlier one.
    pub(crate) served: bool,
    /// What was [kept](Opened::kept) of it then.
    pub(crate) kept: Option<Value>,
    /// What it was [known](Built::known) to be in an earlier life of its guest's.
    pub(crate) known: Option<Value>,
    /// What the last worker had of its back-end, if that is there still.
    pub(crate) inherited: Option<Inherited>,
}

/// What a worker had of a device's back-end, which the next one is to have.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) socket: OwnedFd,
    /// The memory that both have.
    pub(crate) left: OwnedFd,
}

impl Wanted<'_> {
    /// The settings that its guest's file has for the device, or that it was created with, or the configuration, if it has a
    /// `[[virtio]]` for it.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub(crate) fn settings<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        self.table().map(parse_settings).transpose()
    }

    fn table(&self) -> Option<&toml::Table> {
        match self.source {
            EntryKind::Virtio {
                settings: Some(settings),
                ..
            } => Some(settings),
            _ => {
                let device = self.config.device(self.name, self.key.devid);
                let configured = device.map(|device| &device.settings);
                self.created.as_ref().or(configured)
            }
        }
    }

    /// Who is to serve it: what has served it goes on.
    pub(crate) fn service(&self) -> Service {
        if self.served {
            return Service::of_kept(self.kept.as_ref());
        }
        match self.source {
            EntryKind::Disk { .. } => Service::Own,
            EntryKind::Virtio { .. } => self.table().map_or(Service::Own, Service::of),
        }
    }
}

/// # Errors
///
/// The key that is wrong.
pub(crate) fn parse_settings<T: DeserializeOwned>(settings: &toml::Table) -> Result<T> {
    let parsed = settings.clone().try_into();
    parsed.map_err(|error: toml::de::Error| {
        // Of a wrong value it says on a second line whose it is.
        let lines = error.to_string();
        anyhow::Error::msg(lines.trim().replace('\n', " "))
    })
}

/// Somebody else has what the device needs, and may let go of it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Busy(pub(crate) String);

/// An earlier worker of the guest's has what the device needs, which nobody else can have until that has ended.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Held(pub(crate) String);

/// Whether a device that failed may do better by itself.
pub(crate) fn is_busy(error: &anyhow::Error) -> bool {
    error.is::<Busy>() || is_held(error)
}

/// Whether a device that failed is with an earlier worker.
pub(crate) fn is_held(error: &anyhow::Error) -> bool {
    error.is::<Held>()
}

/// An ioctl's number as the system call filter compares it.
fn ioctl_number(request: impl Into<u64>) -> u64 {
    request.into()
}

/// Why `what` could not be taken for a device, which the guest has had from an earlier worker if it was `served`.
fn in_use(served: bool, error: io::Error, what: &str) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::ResourceBusy if served => {
            Held(format!("its earlier worker has {what} still")).into()
        }
        io::ErrorKind::AddrInUse | io::ErrorKind::ResourceBusy => {
            Busy(format!("somebody else has {what}")).into()
        }
        _ => anyhow::Error::new(error).context(format!("taking {what}")),
    }
}

/// Opens a device of dom0's kernel, which has it by `option`.
fn open_device(path: &Path, option: &str, flags: OFlags) -> Result<OwnedFd> {
    let opened = open(path, OFlags::RDWR | OFlags::CLOEXEC | flags, Mode::empty());
    let path = path.display();
    opened.with_context(|| format!("opening {path} (has dom0's kernel {option}?)"))
}

/// `value` as one part of the service hands it to another.
pub(crate) fn spec(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("structures with named fields")
}
