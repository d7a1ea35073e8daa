//! A network interface: a tap or a macvtap of dom0's, whose frames a worker moves.

pub mod helper;
mod interfaces;
mod made;
mod settings;

use interfaces::Failure;
pub(super) use interfaces::{Opening, Request, ask};
pub(crate) use made::{MadeInterface, sweep};
pub(super) use settings::{TAP, check_mtu, check_name, warnings};

use super::feature_names;
use super::rate::Rate;
use super::vhost_user::parse_mac;
use super::{
    Building, Built, Busy, Changed, Control, DeviceKind, NewDevice, Opened, Order, Resources,
    SyscallRule, Wanted, ioctl_number, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state::{self, Backing};
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result, bail, ensure};
use made::{DEFAULT_SCRIPT, Made};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use settings::{BRIDGE, NEEDS, SCRIPT, Settings};
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use xen_virtio_backend::net::{Interface, Link, MAX_PAIRS, Net, Setup, Tap};
use xen_virtio_backend::tap::{self, Queues, TUN_F_USO4, TUN_F_USO6};
use xen_virtio_backend::{DeviceType, StateCell};

/// How often it is tried to have an interface taken away that nobody answers for, and the wait between: for an hour.
const TRIES: usize = 120;
const TRY: Duration = Duration::from_secs(30);

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

/// Takes away the interface of a device that is no more, of which this was kept, if one was made for it and nobody has begun to take
/// it away: an earlier service may have ended before it did.
pub(crate) fn end_left(kept: Value, domid: u16, key: EntryKey) {
    let Ok(Spec {
        made: Some(made), ..
    }) = serde_json::from_value(kept)
    else {
        return;
    };
    take_away(MadeInterface::new(&made, domid, key), Request::EndLeft);
}

/// Takes away the interface of a device that is no more.
pub(crate) fn end(made: MadeInterface) {
    take_away(made, Request::End);
}

/// Whether there is nothing to take away of an interface that was not opened: an earlier worker may have one that it was `served`, and
/// whoever has not answered may have made it.
fn leaves_nothing(failure: &Failure, served: bool) -> bool {
    !served && matches!(failure, Failure::Refused(_))
}

fn take_away(made: MadeInterface, request: fn(MadeInterface) -> Request) {
    let request = request(made.clone());
    let Err(failure) = ask(&request) else { return };
    let again = matches!(failure, Failure::Unanswered(_));
    let error = anyhow::Error::from(failure);
    tracing::warn!("an interface is not taken away: {error:#}");
    if !again {
        return;
    }
    // Whoever it is left to is busy, or starts anew. The next device by that name is not to lose its own.
    let waits = made.is_to_end();
    let thread = thread::Builder::new().name("interface".to_owned());
    let _ = thread.spawn(move || {
        let is_answered = |_| {
            thread::sleep(TRY);
            !matches!(ask(&request), Err(Failure::Unanswered(_)))
        };
        if !(0..TRIES).any(is_answered) {
            let interface = &made.interface;
            tracing::error!(
                "{interface} stays until the next start of the service: nobody takes it away"
            );
        }
        drop(waits);
    });
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
        made::check_ending(name)?;
        let made = built_by.made.as_ref();
        let made = made.map(|made| MadeInterface::new(made, wanted.guest.domid, wanted.key));
        let taken = uses.take_interface(name, wanted.guest, wanted.name, wanted.key, made.clone());
        let is_new_use = taken.map_err(|user| Busy(format!("tap = {name} is in use: {user}")))?;
        let opening = Opening {
            interface: name.clone(),
            mac: built_by.mac,
            mtu: built_by.mtu,
            queues: built_by.queues,
            made,
            is_new: wanted.kept.is_none(),
            served: wanted.served,
        };
        let queues = ask(&Request::Open(opening)).map_err(|failure| {
            if is_new_use && leaves_nothing(&failure, wanted.served) {
                uses.give_up_interface(wanted.guest, wanted.key);
            }
            anyhow::Error::from(failure)
        });
        let queues = queues?.descriptors;
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
    use crate::devices::Held;
    use crate::toolstack::libxl::EntryForm;

    #[test]
    fn an_interface_that_may_be_there_is_taken_away_some_time() {
        let unanswered = Failure::Unanswered(String::new());
        let refused = Failure::Refused(anyhow::anyhow!("no such bridge"));
        let held = Failure::Refused(Held("its earlier worker has it".to_owned()).into());
        assert!(leaves_nothing(&refused, false));
        assert!(!leaves_nothing(&held, true) && !leaves_nothing(&unanswered, false));
    }

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
