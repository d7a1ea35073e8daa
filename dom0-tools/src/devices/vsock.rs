//! Sockets of our own: streams between a guest and programs of dom0's, at Unix sockets that Firecracker's users know.

use super::kernel_vhost::check_cid;
use super::{
    Building, Built, Control, DeviceKind, Listen, NewDevice, Opened, Resources, Wanted,
    parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state;
use crate::ipc::FromWorker;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use xen_virtio_backend::DeviceType;
use xen_virtio_backend::vsock::{Dial, Switchboard, Vsock};

/// The setting that has us serve a socket device, and not dom0's kernel.
pub(crate) const LISTEN: &str = "listen";

/// The longest path of a Unix socket: `sockaddr_un` has room for so many bytes and the end.
const MAX_PATH: usize = 107;
/// What follows it for the longest port.
const MAX_SUFFIX: usize = "_4294967295".len();

pub(super) struct VsockKind;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// The guest's number.
    cid: u32,
    /// Where programs of dom0's connect to the guest, and, with `_PORT` behind it, where the guest connects to them.
    listen: PathBuf,
}

impl Settings {
    fn check(self) -> Result<Self> {
        check_cid(self.cid)?;
        let Self { listen, .. } = &self;
        let shown = listen.display();
        ensure!(listen.is_absolute(), "listen = {shown} is no absolute path");
        let name = listen
            .file_name()
            .and_then(OsStr::to_str)
            .unwrap_or_default();
        let behind = name.rsplit_once('_').map(|(_, behind)| behind);
        ensure!(
            behind.is_none_or(|behind| behind.parse::<u32>().is_err()),
            "listen = {shown} ends as the socket of a port: a guest whose path is the beginning of it would be connected to this one"
        );
        let room = MAX_PATH - MAX_SUFFIX;
        let len = listen.as_os_str().len();
        ensure!(
            len <= room,
            "listen = {shown} has {len} bytes: no more than {room} leave room for a port behind it"
        );
        Ok(self)
    }
}

/// How what comes to a device got there.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Arrival {
    /// A program of dom0's has connected.
    Visitor,
    /// A dial was answered, by a descriptor or by none.
    Dialled { number: u64 },
}

/// What a worker is told with the answer to the dial of this number.
pub(crate) fn dialled(number: u64) -> Value {
    spec(&Arrival::Dialled { number })
}

impl DeviceKind for VsockKind {
    fn device_type(&self) -> DeviceType {
        Vsock::DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        super::feature_names::of(Vsock::DEVICE_TYPE.0)
    }

    fn needs(&self) -> Option<&'static str> {
        Some("cid = the guest's number and listen = a socket's path")
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_VSOCKETS")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        let settings = parse_settings::<Settings>(settings).ok();
        let folder = settings.and_then(|settings| Some(settings.listen.parent()?.to_owned()));
        let missing = folder.filter(|folder| !folder.is_dir());
        missing
            .map(|folder| format!("there is no folder {}", folder.display()))
            .into_iter()
            .collect()
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<Settings>(settings)?.check().map(drop)
    }

    fn state_bytes(&self, _spec: &Value) -> usize {
        guest_state::device_bytes(&[], &Vsock::QUEUE_SIZES)
    }

    fn open(&self, wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        let settings: Settings = match wanted.kept.clone() {
            Some(kept) => serde_json::from_value(kept)?,
            None => wanted
                .settings::<Settings>()?
                .context("it has no settings")?
                .check()?,
        };
        let Settings { cid, listen } = &settings;
        Ok(Opened {
            kept: Some(spec(&settings)),
            listens: vec![Listen {
                path: listen.clone(),
                change: spec(&Arrival::Visitor),
            }],
            dials: Some(listen.clone()),
            ..Opened::new(
                format!("vsock, cid {cid}, {}", listen.display()),
                spec(&settings),
            )
        })
    }

    fn build(&self, new: NewDevice<'_>, resources: &Resources<'_>) -> Result<Building> {
        let Settings { cid, .. } = serde_json::from_value(new.spec)?;
        let channel = resources.channel.context("nobody could connect for it")?;
        let (channel, key) = (Rc::clone(channel), new.key);
        let dial = Dial::new(move |number, port| {
            channel
                .send(&FromWorker::Dials { key, number, port })
                .is_ok()
        });
        let device = Vsock::new(cid.into(), new.served, dial)?;
        let switchboard = device.switchboard();
        Ok(Building::Ready(Built {
            device: Box::new(device),
            control: Some(Box::new(VsockControl(switchboard))),
            known: None,
        }))
    }
}

struct VsockControl(Switchboard);

impl Control for VsockControl {
    fn change(&self, change: &Value, descriptors: Vec<OwnedFd>) -> Result<()> {
        let socket = descriptors.into_iter().next();
        match Arrival::deserialize(change)? {
            Arrival::Visitor => self.0.visit(socket.context("no connection came")?),
            Arrival::Dialled { number } => self.0.dialled(number, socket),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_judged() {
        let check = |settings: &str| {
            let settings = settings.parse::<toml::Table>().unwrap();
            VsockKind.check_settings(&settings)
        };
        let long = |len: usize| format!("cid = 3\nlisten = \"/{}\"", "v".repeat(len - 1));
        check("cid = 3\nlisten = \"/run/v\"").unwrap();
        check(&long(96)).unwrap();
        for (settings, wrong) in [
            ("listen = \"/run/v\"".to_owned(), "missing field `cid`"),
            ("cid = 3".to_owned(), "missing field `listen`"),
            (
                "cid = 2\nlisten = \"/v\"".to_owned(),
                "cid = 2 is not from 3",
            ),
            (
                "cid = 3\nlisten = \"v\"".to_owned(),
                "v is no absolute path",
            ),
            ("cid = 3\nlisten = 5".to_owned(), "integer"),
            (
                "cid = 3\nlisten = \"/v\"\nport = 5".to_owned(),
                "unknown field `port`",
            ),
            (
                "cid = 3\nlisten = \"/run/vm_1\"".to_owned(),
                "/run/vm_1 ends as the socket of a port",
            ),
            (long(97), "has 97 bytes: no more than 96"),
        ] {
            let error = check(&settings).unwrap_err().to_string();
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }
}
