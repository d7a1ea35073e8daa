//! A network interface: a tap or a macvtap of dom0's, whose frames a worker moves.

mod made;
mod settings;

pub(crate) use made::{MadeInterface, sweep};
pub(super) use settings::{TAP, check_mtu, check_name, warnings};

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
use settings::{BRIDGE, NEEDS, SCRIPT, Settings, missing_bridge};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use xen_virtio_backend::net::{Interface, Link, MAX_PAIRS, Net, Setup, Tap};
use xen_virtio_backend::tap::{self, Queues, TUN_F_USO4, TUN_F_USO6};
use xen_virtio_backend::{DeviceType, StateCell};

const INTERFACES: &str = "/sys/class/net";

pub(super) struct NetKind;

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

/// Says how interface `name` is made, with several queues or one, if it is not there. The kernel would make one by that name
/// itself, which nobody has put anywhere.
pub(super) fn missing(name: &str, several: bool) -> Option<String> {
    let queues = if several { " multi_queue" } else { "" };
    let is_there = Path::new(INTERFACES).join(name).exists();
    (!is_there)
        .then(|| format!("there is no interface {name}: ip tuntap add dev {name} mode tap{queues}"))
}

/// Takes away the interface of a device that is no more, of which this was kept, if one was made for it and nobody has begun to take
/// it away: an earlier service may have ended before it did.
pub(crate) fn end_left(kept: Value, domid: u16, key: EntryKey) {
    let Ok(Spec {
        made: Some(made),
        interface,
        ..
    }) = serde_json::from_value(kept)
    else {
        return;
    };
    if Path::new(INTERFACES).join(&interface).exists() && !made::is_ending(&interface) {
        MadeInterface::new(&made, domid, key).end();
    }
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
        let of_interface = fs::read_to_string(Path::new(INTERFACES).join(name).join("mtu"))
            .with_context(|| format!("asking {name} for its mtu"))?;
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
        if let (None, Some(made)) = (&wanted.kept, &built_by.made)
            && made.script == Path::new(DEFAULT_SCRIPT)
            && let Some(missing) = made.bridge.as_deref().and_then(missing_bridge)
        {
            bail!(missing);
        }
        if made::is_ending(name) {
            return Err(Busy(format!("{name} is being taken from its bridge")).into());
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
            descriptors: queues,
            kept: Some(spec(&built_by)),
            ..Opened::new(
                format!("net on {}{pairs}", built_by.interface),
                spec(&built_by),
            )
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
}
