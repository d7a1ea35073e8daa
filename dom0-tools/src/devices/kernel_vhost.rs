//! Devices that dom0's kernel serves: vhost-vsock, by which the guest reaches dom0's `AF_VSOCK`, and vhost-net on a tap.

use super::vhost_user::parse_mac;
use super::{
    Building, Built, DeviceKind, NewDevice, Opened, Resources, SyscallRule, Wanted, in_use,
    ioctl_number, net, open_device, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::devices::net::{Opening, Request};
use crate::guest_state;
use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use virtio_bindings::virtio_ids as ids;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU,
};
use xen_virtio_backend::DeviceType;
use xen_virtio_backend::vhost_kernel::{Kernel, abi, set_guest_cid};
use xen_virtio_backend::vhost_user::{Class, Frontend, Setup};

/// The setting that has dom0's kernel serve a socket device, and the one that has it serve a network device.
pub(crate) const CID: &str = "cid";
pub(crate) const VHOST: &str = "vhost";

/// The numbers that a guest may have: those before are the hypervisor's and the host's (`linux/vm_sockets.h`).
const CIDS: std::ops::Range<u32> = 3..u32::MAX;

/// Bytes for the data of requests.
const POOL: usize = 8 << 20;
/// The place of the largest packet's size in a network device's configuration space (virtio 1.3, 5.1.4).
const MTU_PLACE: usize = 10;

/// What the interface does for the driver, and the driver for it.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

pub(super) struct VsockKind;
pub(super) struct NetKind;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockSettings {
    /// The guest's number.
    cid: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetSettings {
    /// The interface's name.
    tap: String,
    /// The guest's address.
    mac: String,
    /// The largest packet that it takes.
    mtu: Option<u16>,
    /// The kernel serves it.
    #[serde(default)]
    vhost: bool,
}

impl VsockSettings {
    fn check(self) -> Result<Self> {
        check_cid(self.cid)?;
        Ok(self)
    }
}

/// # Errors
///
/// If no guest can have this number.
pub(super) fn check_cid(cid: u32) -> Result<()> {
    let (first, last) = (CIDS.start, CIDS.end - 1);
    ensure!(
        CIDS.contains(&cid),
        "cid = {cid} is not from {first} to {last}"
    );
    Ok(())
}

impl NetSettings {
    fn check(self) -> Result<Self> {
        net::check_name(net::TAP, &self.tap)?;
        parse_mac(&self.mac)?;
        net::check_mtu(self.mtu)?;
        Ok(self)
    }
}

impl DeviceKind for VsockKind {
    fn device_type(&self) -> DeviceType {
        DeviceType(ids::VIRTIO_ID_VSOCK)
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn needs(&self) -> Option<&'static str> {
        Some("cid = the guest's number, by dom0's kernel")
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_VSOCKETS")
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<VsockSettings>(settings)?.check().map(drop)
    }

    fn state_bytes(&self, _spec: &serde_json::Value) -> usize {
        state_bytes(self)
    }

    fn open(&self, wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        let settings = settings(wanted, VsockSettings::check)?;
        let VsockSettings { cid } = settings;
        let device = open_device(
            "/dev/vhost-vsock".as_ref(),
            "CONFIG_VHOST_VSOCK",
            OFlags::empty(),
        )?;
        let set = set_guest_cid(device.as_fd(), cid);
        set.map_err(|error| in_use(wanted.served, error, &format!("cid = {cid}")))?;
        let detail = format!("vsock by dom0's kernel, cid {cid}");
        Ok(opened(detail, &settings, vec![device]))
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let VsockSettings { cid } = serde_json::from_value(new.spec)?;
        let [device] = descriptors(new.descriptors)?;
        let config = vec![(0, u64::from(cid).to_le_bytes().to_vec())];
        build(self, config, 0, Kernel::vsock(device))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        vec![SyscallRule {
            call: libc::SYS_ioctl,
            argument: Some((1, abi::OF_A_WORKER.map(ioctl_number).to_vec())),
        }]
    }
}

impl DeviceKind for NetKind {
    fn device_type(&self) -> DeviceType {
        DeviceType(ids::VIRTIO_ID_NET)
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn needs(&self) -> Option<&'static str> {
        Some("tap = the interface in dom0 and vhost = true, by dom0's kernel")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        net::warnings(settings)
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_NET")
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<NetSettings>(settings)?.check().map(drop)
    }

    fn state_bytes(&self, _spec: &serde_json::Value) -> usize {
        state_bytes(self)
    }

    fn open(&self, wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        let settings = settings(wanted, NetSettings::check)?;
        let name = &settings.tap;
        let device = open_device(
            "/dev/vhost-net".as_ref(),
            "CONFIG_VHOST_NET",
            OFlags::empty(),
        )?;
        let opening = Opening {
            interface: name.clone(),
            mac: parse_mac(&settings.mac)?,
            // The driver's affair, as ever.
            mtu: None,
            queues: 1,
            made: None,
            is_new: wanted.kept.is_none(),
            served: wanted.served,
        };
        let tap = net::ask(&Request::Open(opening))?.descriptors;
        let detail = format!("net by dom0's kernel, {name}");
        let descriptors = std::iter::once(device).chain(tap);
        Ok(opened(detail, &settings, descriptors.collect()))
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let settings: NetSettings = serde_json::from_value(new.spec)?;
        let [device, tap] = descriptors(new.descriptors)?;
        let mut config = vec![(0, parse_mac(&settings.mac)?.to_vec())];
        let mut features = OFFLOADS | 1 << VIRTIO_NET_F_MAC;
        if let Some(mtu) = settings.mtu {
            config.push((MTU_PLACE, mtu.to_le_bytes().to_vec()));
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        build(self, config, features, Kernel::net(device, tap))
    }
}

/// What the guest has had it with, or is to have.
fn settings<T: serde::de::DeserializeOwned>(
    wanted: &Wanted<'_>,
    check: fn(T) -> Result<T>,
) -> Result<T> {
    match wanted.kept.clone() {
        Some(kept) => Ok(serde_json::from_value(kept)?),
        None => check(wanted.settings()?.context("it has no settings")?),
    }
}

fn opened(detail: String, settings: &impl Serialize, descriptors: Vec<OwnedFd>) -> Opened {
    Opened {
        detail,
        spec: spec(settings),
        descriptors,
        backing: None,
        kept: Some(spec(settings)),
        back_end: None,
        listens: Vec::new(),
        dials: None,
    }
}

fn class(kind: &dyn DeviceKind) -> &'static Class {
    Class::of(kind.device_type()).expect("a class for each kind")
}

fn state_bytes(kind: &dyn DeviceKind) -> usize {
    let class = class(kind);
    guest_state::device_bytes(&[], &vec![class.queue_size; class.queues.into()])
}

fn descriptors<const N: usize>(found: Vec<OwnedFd>) -> Result<[OwnedFd; N]> {
    let count = found.len();
    let exactly = <[OwnedFd; N]>::try_from(found).ok();
    exactly.with_context(|| format!("{count} descriptors instead of {N}"))
}

fn build(
    kind: &dyn DeviceKind,
    config: Vec<(usize, Vec<u8>)>,
    features: u64,
    kernel: Kernel,
) -> Result<Building> {
    let class = class(kind);
    let setup = Setup {
        class,
        queue_size: class.queue_size,
        pool: POOL,
        config,
        features,
    };
    Ok(Building::Ready(Built {
        device: Box::new(Frontend::of_kernel(setup, kernel)?),
        control: None,
        known: None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_judged() {
        let check = |kind: &dyn DeviceKind, settings: &str| {
            kind.check_settings(&settings.parse::<toml::Table>().unwrap())
        };
        check(&VsockKind, "cid = 3").unwrap();
        let mac = "mac = \"00:16:3e:00:00:01\"\nvhost = true\n";
        check(&NetKind, &format!("{mac}tap = \"vif3.0\"")).unwrap();
        let cases: [(&dyn DeviceKind, String, &str); 6] = [
            (&NetKind, format!("{mac}tap = \"vif\"\nmtu = 0"), "mtu = 0"),
            (&VsockKind, "cid = 2".to_owned(), "cid = 2 is not from 3"),
            (&VsockKind, "cid = 4294967295".to_owned(), "is not from 3"),
            (&VsockKind, "cid = 3\nmtu = 5".to_owned(), "mtu"),
            (&NetKind, "tap = \"vif\"".to_owned(), "mac"),
            (&NetKind, format!("{mac}tap = \"\""), "no interface's name"),
        ];
        for (kind, settings, wrong) in cases {
            let error = check(kind, &settings).unwrap_err().to_string();
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }
}
