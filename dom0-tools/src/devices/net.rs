//! A network interface: a tap or a macvtap of dom0's, whose frames a worker moves.

mod made;

pub(crate) use made::{MadeInterface, sweep};

use super::feature_names;
use super::rate::Rate;
use super::vhost_user::parse_mac;
use super::{
    Building, Built, Busy, Changed, Control, DeviceKind, NewDevice, Opened, Order, Resources,
    SyscallRule, Wanted, in_use, ioctl_number, open_device, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state::{self, Backing};
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result, bail, ensure};
use made::{DEFAULT_SCRIPT, Made};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use xen_virtio_backend::net::{Interface, Link, MAX_PAIRS, Net, Setup, Tap};
use xen_virtio_backend::tap::{self, Queues, TUN_F_USO4, TUN_F_USO6};
use xen_virtio_backend::{DeviceType, StateCell};

/// The setting that names the interface.
pub(super) const TAP: &str = "tap";
/// Those that have one made.
const BRIDGE: &str = "bridge";
const SCRIPT: &str = "script";
const NEEDS: &str =
    "tap = the interface in dom0, or bridge = the one that an interface is made for";
/// The smallest size of a packet that may be the largest: what any host takes (RFC 791).
const MIN_MTU: u16 = 68;
const INTERFACES: &str = "/sys/class/net";

pub(super) struct NetKind;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Settings {
    /// The name of an interface that is there.
    tap: Option<String>,
    /// The bridge that one is made for,
    bridge: Option<String>,
    /// … the script that gives it to that,
    script: Option<PathBuf>,
    /// … and what that is told of the guest's addresses.
    ip: Option<String>,
    /// The guest's address.
    mac: String,
    /// The largest packet that it takes.
    mtu: Option<u16>,
    /// Pairs of queues.
    #[serde(default = "one")]
    queues: u16,
    /// The kernel does not serve it: with `true`, it is a device of another kind.
    #[serde(default, rename = "vhost")]
    _vhost: bool,
    send_bytes_per_second: Option<NonZeroU64>,
    send_frames_per_second: Option<NonZeroU64>,
    receive_bytes_per_second: Option<NonZeroU64>,
    receive_frames_per_second: Option<NonZeroU64>,
}

fn one() -> u16 {
    1
}

/// What the guest has had it with, and a worker builds it by. `interface` is not called as the setting is: what the kernel served
/// an earlier guest by is told by that name.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Spec {
    interface: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    queues: u16,
    /// The interface segments UDP.
    segments_udp: bool,
    sends: Rate,
    receives: Rate,
    /// The cable is plugged in.
    is_up: bool,
    /// It was made for the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made: Option<Made>,
}

impl Settings {
    fn check(self) -> Result<Self> {
        match (&self.tap, self.bridge.is_some() || self.script.is_some()) {
            (Some(tap), false) => check_name(TAP, tap)?,
            (None, true) => {}
            (Some(_), true) => {
                bail!("bridge and script are for an interface that is made, and tap names one")
            }
            (None, false) => bail!("it needs {NEEDS}"),
        }
        if let Some(bridge) = &self.bridge {
            check_name(BRIDGE, bridge)?;
        }
        if let Some(script) = &self.script {
            ensure!(
                script.is_absolute(),
                "script = {} is no absolute path",
                script.display()
            );
        }
        ensure!(
            self.ip.is_none() || self.tap.is_none(),
            "ip is for the script of an interface that is made"
        );
        parse_mac(&self.mac)?;
        check_mtu(self.mtu)?;
        ensure!(
            (1..=MAX_PAIRS).contains(&self.queues),
            "queues = {} is not from 1 to {MAX_PAIRS}",
            self.queues
        );
        Ok(self)
    }
}

/// Whether `name`, which `key` has, can be an interface's.
pub(super) fn check_name(key: &str, name: &str) -> Result<()> {
    let odd = |letter: char| letter.is_whitespace() || matches!(letter, '/' | ':' | '%');
    let is_dots = matches!(name, "." | "..");
    ensure!(
        (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(odd) && !is_dots,
        "{key} = {name:?} is no interface's name"
    );
    Ok(())
}

pub(super) fn check_mtu(mtu: Option<u16>) -> Result<()> {
    let mtu = mtu.unwrap_or(MIN_MTU);
    ensure!(mtu >= MIN_MTU, "mtu = {mtu} is less than {MIN_MTU}");
    Ok(())
}

/// What a device whose settings name `tap` will not be served for, as dom0 is now.
pub(super) fn warnings(settings: &toml::Table) -> Vec<String> {
    let tap = settings.get(TAP).and_then(toml::Value::as_str);
    let queues = settings.get("queues").and_then(toml::Value::as_integer);
    let missing = tap.and_then(|tap| missing(tap, queues > Some(1)));
    let bridge = settings.get(BRIDGE).and_then(toml::Value::as_str);
    let bridge = bridge.filter(|bridge| !Path::new(INTERFACES).join(bridge).exists());
    let bridge = bridge
        .map(|bridge| format!("there is no bridge {bridge}: ip link add {bridge} type bridge"));
    missing.into_iter().chain(bridge).collect()
}

/// Says how interface `name` is made, with several queues or one, if it is not there. The kernel would make one by that name
/// itself, which nobody has put anywhere.
pub(super) fn missing(name: &str, several: bool) -> Option<String> {
    let queues = if several { " multi_queue" } else { "" };
    let is_there = Path::new(INTERFACES).join(name).exists();
    (!is_there)
        .then(|| format!("there is no interface {name}: ip tuntap add dev {name} mode tap{queues}"))
}

impl Spec {
    fn of(settings: Settings, domid: u16, key: EntryKey) -> Result<Self> {
        let (interface, made) = match settings.tap {
            Some(tap) => (tap, None),
            None => {
                let made = Made {
                    script: settings.script.unwrap_or_else(|| DEFAULT_SCRIPT.into()),
                    bridge: settings.bridge,
                    ip: settings.ip,
                    several_queues: settings.queues > 1,
                };
                (made::name(domid, key), Some(made))
            }
        };
        Ok(Self {
            mac: parse_mac(&settings.mac)?,
            interface,
            made,
            mtu: settings.mtu,
            queues: settings.queues,
            segments_udp: false,
            sends: Rate {
                bytes: settings.send_bytes_per_second,
                operations: settings.send_frames_per_second,
                burst_seconds: 0,
            },
            receives: Rate {
                bytes: settings.receive_bytes_per_second,
                operations: settings.receive_frames_per_second,
                burst_seconds: 0,
            },
            is_up: true,
        })
    }

    fn kind_of_queues(&self) -> Queues {
        made::queues(self.queues > 1)
    }

    /// Whether the interface takes no larger packets than the guest is told of, which it would have to drop.
    fn check_mtu(&self) -> Result<()> {
        let Some(mtu) = self.mtu else { return Ok(()) };
        // One that is made gets that of its bridge.
        let name = match &self.made {
            Some(Made { bridge: None, .. }) => return Ok(()),
            Some(Made {
                bridge: Some(bridge),
                ..
            }) => bridge,
            None => &self.interface,
        };
        let of_interface = fs::read_to_string(Path::new(INTERFACES).join(name).join("mtu"))?;
        ensure!(
            of_interface.trim() == mtu.to_string(),
            "mtu = {mtu}, and {name} has {}: ip link set {name} mtu {mtu}",
            of_interface.trim()
        );
        Ok(())
    }

    /// The file whose descriptors are queues of the interface.
    fn file(&self) -> Result<PathBuf> {
        let name = &self.interface;
        let interface = Path::new(INTERFACES).join(name);
        if !interface.join("macvtap").exists() {
            return Ok("/dev/net/tun".into());
        }
        // It receives what is for its own address, and nothing else.
        let address = fs::read_to_string(interface.join("address"))?;
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        ensure!(
            address.trim() == mac,
            "the macvtap {name} has the address {}, and the guest is to have {mac}: ip link set {name} address {mac}",
            address.trim()
        );
        let index = fs::read_to_string(interface.join("ifindex"))?;
        Ok(format!("/dev/tap{}", index.trim()).into())
    }

    fn open(&self, wanted: &Wanted<'_>) -> Result<Vec<OwnedFd>> {
        let name = &self.interface;
        let file = self.file()?;
        let open = |_| {
            let queue = open_device(
                &file,
                "CONFIG_TUN, or for a macvtap CONFIG_MACVTAP",
                OFlags::NONBLOCK,
            )?;
            let attached = tap::attach(queue.as_fd(), name, self.kind_of_queues());
            match attached {
                Ok(()) => Ok(queue),
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => bail!(
                    "{name} is no tap with {} (queues = {})",
                    match self.queues {
                        1 => "one queue, as `ip tuntap add` makes it without multi_queue",
                        _ => "several queues, as `ip tuntap add … multi_queue` makes it",
                    },
                    self.queues
                ),
                Err(error) => Err(in_use(wanted, error, &format!("tap = {name}"))),
            }
        };
        (0..self.queues).map(open).collect()
    }
}

impl DeviceKind for NetKind {
    fn device_type(&self) -> DeviceType {
        Net::DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn needs(&self) -> Option<&'static str> {
        Some(NEEDS)
    }

    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        feature_names::of(VIRTIO_ID_NET)
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        warnings(settings)
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_NET")
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        ensure!(
            [TAP, BRIDGE, SCRIPT]
                .iter()
                .any(|key| settings.contains_key(*key)),
            "it needs {NEEDS}"
        );
        parse_settings::<Settings>(settings)?.check().map(drop)
    }

    fn state_bytes(&self, _spec: &Value) -> usize {
        let kept = Net::kept_bytes(MAX_PAIRS);
        guest_state::device_bytes(&[kept], &Net::queue_sizes(MAX_PAIRS))
    }

    fn open(&self, wanted: &Wanted<'_>, uses: &mut Uses) -> Result<Opened> {
        let mut built_by = match wanted.kept.clone() {
            Some(kept) => serde_json::from_value(kept)?,
            None => {
                let settings: Option<Settings> = wanted.settings()?;
                let settings = settings.with_context(|| {
                    format!(
                        "nothing says which interface this is: its settings need {NEEDS}, and mac"
                    )
                })?;
                Spec::of(settings.check()?, wanted.guest.domid, wanted.key)?
            }
        };
        let name = &built_by.interface;
        let missing = missing(name, built_by.queues > 1);
        if let (Some(missing), None) = (&missing, &built_by.made) {
            bail!(missing.clone());
        }
        if wanted.kept.is_none() {
            built_by.check_mtu()?;
        }
        let made = built_by.made.as_ref();
        let made = made.map(|made| MadeInterface::new(made, wanted.guest.domid, wanted.key));
        let taken = uses.take_interface(name, wanted.guest, wanted.name, wanted.key, made.clone());
        taken.map_err(|user| Busy(format!("tap = {name} is in use: {user}")))?;
        let queues = built_by.open(wanted)?;
        if let Some(made) = made
            && (wanted.kept.is_none() || missing.is_some())
        {
            made.begin(queues.first().expect("at least one"))?;
        }
        if wanted.kept.is_none() {
            let of_udp = libc::TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6;
            let queue = queues.first().expect("at least one");
            // What the driver accepts is set when it has.
            built_by.segments_udp = tap::set_offloads(queue.as_fd(), of_udp).is_ok();
        }
        let mut pairs = match built_by.queues {
            1 => String::new(),
            more => format!(", {more} queues"),
        };
        if let Some(bridge) = built_by.made.as_ref().and_then(|made| made.bridge.as_ref()) {
            pairs += &format!(", in {bridge}");
        }
        Ok(Opened {
            detail: format!("net on {}{pairs}", built_by.interface),
            spec: spec(&built_by),
            descriptors: queues,
            backing: None,
            kept: Some(spec(&built_by)),
            back_end: None,
            listens: Vec::new(),
        })
    }

    fn change(
        &self,
        order: Order,
        kept: Option<Value>,
        _backing: Option<Backing>,
    ) -> Result<Changed> {
        let Order::Link { is_up } = order else {
            bail!("a device of type {} has no {}", self.name(), order.part());
        };
        let kept = kept.context("nothing is recorded of it")?;
        let kept: Spec = serde_json::from_value(kept)?;
        Ok(Changed {
            done: format!("the link is {}", if is_up { "up" } else { "down" }),
            kept: Some(spec(&Spec { is_up, ..kept })),
            change: spec(&is_up),
        })
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let built_by: Spec = serde_json::from_value(new.spec)?;
        let count = new.descriptors.len();
        ensure!(
            count == usize::from(built_by.queues),
            "{count} descriptors came for {} queues",
            built_by.queues
        );
        let kind_of_queues = built_by.kind_of_queues();
        let tap = |queue| Box::new(Tap::new(queue, kind_of_queues)) as Box<dyn Interface>;
        let kept = new.records.own(0, Net::kept_bytes(built_by.queues))?;
        let setup = Setup {
            mac: built_by.mac,
            mtu: built_by.mtu,
            segments_udp: built_by.segments_udp,
            sends: built_by.sends.into(),
            receives: built_by.receives.into(),
        };
        let interfaces = new.descriptors.into_iter().map(tap).collect();
        let device = Net::new(setup, interfaces, StateCell::new(kept), built_by.is_up)?;
        let control = NetControl(device.link());
        Ok(Building::Ready(Built {
            device: Box::new(device),
            control: Some(Box::new(control)),
            known: None,
        }))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        vec![SyscallRule {
            call: libc::SYS_ioctl,
            argument: Some((
                1,
                [tap::TUNSETOFFLOAD, tap::TUNSETQUEUE]
                    .map(ioctl_number)
                    .to_vec(),
            )),
        }]
    }
}

/// Plugs a device's cable in and out.
struct NetControl(Link);

impl Control for NetControl {
    fn change(&self, change: &Value, _descriptors: Vec<OwnedFd>) -> Result<()> {
        self.0.set_up(bool::deserialize(change)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;

    #[test]
    fn a_cable_is_plugged_and_nothing_else_is_changed() {
        let settings = "mac = \"00:16:3e:00:00:01\"\ntap = \"v\"\nmtu = 9000";
        let settings = toml::from_str::<Settings>(settings).unwrap();
        let key = EntryKey {
            form: EntryForm::Virtio,
            devid: 0,
        };
        let kept = Spec::of(settings, 3, key).unwrap();
        assert!(kept.is_up);
        let down = Order::Link { is_up: false };
        let changed = NetKind.change(down, Some(spec(&kept)), None).unwrap();
        assert_eq!(
            (&*changed.done, changed.change),
            ("the link is down", false.into())
        );
        let mut expected = spec(&kept);
        expected["is_up"] = false.into();
        assert_eq!(changed.kept, Some(expected));
        let refused = NetKind.change(Order::Resize, Some(spec(&kept)), None);
        let error = refused.err().unwrap().to_string();
        assert_eq!(error, "a device of type net has no size");
    }

    #[test]
    fn settings_are_judged() {
        let check = |settings: &str| NetKind.check_settings(&settings.parse().unwrap());
        let mac = "mac = \"00:16:3e:00:00:01\"\n";
        check(&format!("{mac}tap = \"vif3.0\"\nqueues = 8\nmtu = 9000")).unwrap();
        check(&format!("{mac}tap = \"v\"\nvhost = false")).unwrap();
        check(&format!("{mac}bridge = \"br0\"\nip = \"10.0.0.1\"")).unwrap();
        check(&format!(
            "{mac}script = \"/etc/xen/scripts/vif-openvswitch\""
        ))
        .unwrap();
        check(&format!("{mac}tap = \"v\"\nsend-bytes-per-second = 1")).unwrap();
        for (settings, wrong) in [
            (String::new(), "needs tap = the interface in dom0"),
            (mac.to_owned(), "needs tap"),
            ("tap = \"vif\"".to_owned(), "mac"),
            ("tap = \"vif\"\nmac = \"1:2\"".to_owned(), "not like 00:16"),
            (
                "tap = \"vif\"\nmac = \"01:16:3e:00:00:01\"".to_owned(),
                "group",
            ),
            (format!("{mac}tap = \"\""), "no interface's name"),
            (format!("{mac}tap = \"a/b\""), "no interface's name"),
            (format!("{mac}tap = \"..\""), "no interface's name"),
            (
                format!("{mac}tap = \"vif0123456789012\""),
                "no interface's name",
            ),
            (format!("{mac}tap = \"vif\"\nmtu = 67"), "mtu = 67"),
            (format!("{mac}tap = \"vif\"\nmtu = 65536"), "65536"),
            (format!("{mac}tap = \"vif\"\nqueues = 0"), "queues = 0"),
            (format!("{mac}tap = \"vif\"\nqueues = 9"), "from 1 to 8"),
            (
                format!("{mac}tap = \"vif\"\nsend-bytes-per-second = 0"),
                "zero",
            ),
            (
                format!("{mac}tap = \"vif\"\nbridge = \"x\""),
                "tap names one",
            ),
            (
                format!("{mac}tap = \"vif\"\nip = \"10.0.0.1\""),
                "ip is for",
            ),
            (format!("{mac}bridge = \"a/b\""), "bridge = \"a/b\""),
            (format!("{mac}script = \"vif-bridge\""), "no absolute path"),
            (format!("{mac}tap = \"vif\"\nqueues = \"2\""), "string"),
            (format!("{mac}tap = 5"), "string"),
            (
                format!("{mac}tap = \"vif\"\nreceive-frames-per-second = -1"),
                "-1",
            ),
            (format!("{mac}tap = \"vif\"\nvhost = 1"), "boolean"),
        ] {
            let error = format!("{:#}", check(&settings).unwrap_err());
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }
}
