//! Input: a device of dom0's that the guest has for itself, or a keyboard or pointer that exists for what `xen-virtioctl input`
//! injects.

use super::{
    Building, Built, Changed, Control, DeviceKind, NewDevice, Opened, Order, Resources,
    SyscallRule, Wanted, in_use, ioctl_number, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state::{self, Backing};
use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use anyhow::{Context, Result, bail, ensure};
use evdev::raw_stream::RawDevice;
use evdev::{AbsoluteAxisCode, AttributeSetRef, EvdevEnum, EventType, KeyCode, RelativeAxisCode};
use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use xen_virtio_backend::input::{Axis, Description, Evdev, Event, Injecting, Input, kind};
use xen_virtio_backend::{DeviceType, StateCell};

/// Events of one order: a line that somebody types.
pub(crate) const MAX_EVENTS: usize = 256;

/// `BUS_VIRTUAL`.
const VIRTUAL: u16 = 6;

pub(super) struct InputKind;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// A device of dom0's: `/dev/input/…`.
    evdev: Option<PathBuf>,
    /// One that nobody has.
    model: Option<Model>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Model {
    Keyboard,
    Pointer,
}

/// Where a device's events come from.
enum Origin {
    Evdev(PathBuf),
    Model(Model),
}

/// What the guest has, and what a worker builds it by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Spec {
    evdev: Option<PathBuf>,
    name: String,
    serial: String,
    ids: [u16; 4],
    properties: BTreeSet<u16>,
    codes: BTreeMap<u16, BTreeSet<u16>>,
    /// Minimum, maximum, fuzz, flat, resolution.
    axes: BTreeMap<u16, [i32; 5]>,
}

impl Settings {
    fn origin(self) -> Result<Origin> {
        match (self.evdev, self.model) {
            (Some(path), None) => {
                ensure!(
                    path.is_absolute(),
                    "evdev = {} is no absolute path",
                    path.display()
                );
                Ok(Origin::Evdev(path))
            }
            (None, Some(model)) => Ok(Origin::Model(model)),
            _ => bail!(
                "input has either evdev = a device of dom0's, or model = \"keyboard\" or \"pointer\" for what xen-virtioctl injects"
            ),
        }
    }
}

impl Model {
    fn spec(self) -> Spec {
        let (name, codes, axes) = match self {
            Self::Keyboard => (
                "xen-virtio keyboard",
                // KEY_ESC to KEY_MICMUTE.
                vec![(kind::KEY, 1..249)],
                None,
            ),
            Self::Pointer => (
                "xen-virtio pointer",
                // BTN_LEFT to BTN_MIDDLE; ABS_X and ABS_Y; REL_WHEEL.
                vec![
                    (kind::KEY, 0x110..0x113),
                    (kind::ABSOLUTE, 0..2),
                    (kind::RELATIVE, 8..9),
                ],
                Some([0, i32::from(i16::MAX), 0, 0, 0]),
            ),
        };
        Spec {
            evdev: None,
            name: name.to_owned(),
            serial: String::new(),
            ids: [VIRTUAL, 0, 0, 1],
            properties: BTreeSet::new(),
            codes: codes
                .into_iter()
                .map(|(of, codes)| (of, codes.collect()))
                .collect(),
            axes: axes
                .into_iter()
                .flat_map(|axis| [(0, axis), (1, axis)])
                .collect(),
        }
    }
}

impl Spec {
    /// What `device` of dom0's is.
    ///
    /// # Errors
    ///
    /// The system's.
    fn of(path: &Path, device: &RawDevice) -> io::Result<Self> {
        fn numbers<T: EvdevEnum>(set: &AttributeSetRef<T>) -> BTreeSet<u16> {
            let codes = set.iter().map(EvdevEnum::to_index);
            codes.filter_map(|code| u16::try_from(code).ok()).collect()
        }
        let codes = [
            (kind::KEY, device.supported_keys().map(numbers)),
            (
                kind::RELATIVE,
                device.supported_relative_axes().map(numbers),
            ),
            (
                kind::ABSOLUTE,
                device.supported_absolute_axes().map(numbers),
            ),
            (kind::MISC, device.misc_properties().map(numbers)),
            (kind::SWITCH, device.supported_switches().map(numbers)),
        ];
        let mut axes = BTreeMap::new();
        if device.supported_absolute_axes().is_some() {
            for (axis, is) in device.get_absinfo()? {
                let range = [
                    is.minimum(),
                    is.maximum(),
                    is.fuzz(),
                    is.flat(),
                    is.resolution(),
                ];
                axes.insert(axis.0, range);
            }
        }
        let id = device.input_id();
        Ok(Self {
            evdev: Some(path.to_owned()),
            name: device.name().unwrap_or_default().to_owned(),
            serial: device.unique_name().unwrap_or_default().to_owned(),
            ids: [id.bus_type().0, id.vendor(), id.product(), id.version()],
            properties: numbers(device.properties()),
            codes: codes
                .into_iter()
                .filter_map(|(of, codes)| Some((of, codes?)))
                .collect(),
            axes,
        })
    }

    fn description(&self) -> Description {
        let axes = self.axes.iter().map(|(code, axis)| {
            let [minimum, maximum, fuzz, flat, resolution] = *axis;
            let axis = Axis {
                minimum,
                maximum,
                fuzz,
                flat,
                resolution,
            };
            (*code, axis)
        });
        Description {
            name: self.name.clone(),
            serial: self.serial.clone(),
            ids: self.ids,
            properties: self.properties.clone(),
            codes: self.codes.clone(),
            axes: axes.collect(),
        }
    }

    /// Whether it is the same device, whose keys and ranges dom0 may have set otherwise meanwhile.
    fn is_same(&self, other: &Self) -> bool {
        let of = |spec: &Self| (spec.ids, spec.name.clone(), spec.serial.clone());
        of(self) == of(other)
    }

    fn detail(&self) -> String {
        let name = crate::text::without_controls(self.name.chars());
        match &self.evdev {
            Some(path) => format!("input, {} ({name})", path.display()),
            None => format!("input, {name}"),
        }
    }
}

/// The devices of dom0's that guests have: they stay taken while workers come and go, so that nobody else hears of them meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Inputs(Vec<Taken>);

#[derive(Debug)]
struct Taken {
    guest: Identity,
    key: EntryKey,
    path: PathBuf,
    device: OwnedFd,
}

impl Inputs {
    pub(crate) fn end(&mut self, guest: &Identity, key: EntryKey) {
        self.0
            .retain(|taken| taken.guest != *guest || taken.key != key);
    }

    pub(crate) fn end_guest(&mut self, guest: &Identity) {
        self.0.retain(|taken| taken.guest != *guest);
    }

    /// The device at `path`, for the guest alone, which has had the one of `kept`: what it is, and what its events come by.
    fn take(
        &mut self,
        path: &Path,
        kept: Option<&Spec>,
        wanted: &Wanted<'_>,
    ) -> Result<(Spec, OwnedFd)> {
        // A guest that has not begun with it may be to have another one now.
        let is_its = |taken: &&Taken| {
            taken.guest == *wanted.guest && taken.key == wanted.key && taken.path == path
        };
        if let Some(Taken { device, .. }) = self.0.iter().find(is_its)
            && let Ok(raw) = RawDevice::from_fd(device.try_clone()?)
        {
            return Ok((Spec::of(path, &raw)?, device.try_clone()?));
        }
        // What it had was unplugged, or is not to be had any more.
        self.end(wanted.guest, wanted.key);
        let shown = path.display();
        // Whoever may write to it may type by it, into dom0 as well.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty()).with_context(|| format!("opening {shown}"))?;
        let mut device = RawDevice::from_fd(fd.try_clone()?)
            .with_context(|| format!("{shown} is no input device of Linux's"))?;
        let is = Spec::of(path, &device)?;
        // Another device's events are not this guest's, whatever its number: it is not taken for a moment either.
        if let Some(kept) = kept {
            ensure!(
                kept.is_same(&is),
                "{} is where {} was: put that back, or destroy and create the guest to have it use the new one",
                is.detail(),
                kept.detail()
            );
        }
        let grabbed = device.grab();
        grabbed.map_err(|error| in_use(wanted.served, error, &shown.to_string()))?;
        self.0.push(Taken {
            guest: wanted.guest.clone(),
            key: wanted.key,
            path: path.to_owned(),
            device: fd.try_clone()?,
        });
        Ok((is, fd))
    }
}

impl DeviceKind for InputKind {
    fn device_type(&self) -> DeviceType {
        Input::DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "input"
    }

    fn needs(&self) -> Option<&'static str> {
        Some("evdev = a device of dom0's, or model = \"keyboard\" or \"pointer\"")
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_INPUT")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        let settings = parse_settings::<Settings>(settings).and_then(Settings::origin);
        match settings {
            Ok(Origin::Evdev(path)) if !path.exists() => {
                vec![format!("there is no {}", path.display())]
            }
            _ => Vec::new(),
        }
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<Settings>(settings)?.origin().map(drop)
    }

    fn state_bytes(&self, _spec: &Value) -> usize {
        guest_state::device_bytes(&[Input::KEPT], &Input::QUEUE_SIZES)
    }

    fn open(&self, wanted: &Wanted<'_>, uses: &mut Uses) -> Result<Opened> {
        let kept: Option<Spec> = wanted
            .kept
            .clone()
            .map(serde_json::from_value)
            .transpose()?;
        let origin = match &kept {
            Some(Spec { evdev: None, .. }) => None,
            Some(Spec {
                evdev: Some(path), ..
            }) => Some(Origin::Evdev(path.clone())),
            None => Some(
                wanted
                    .settings::<Settings>()?
                    .context("it has no settings")?
                    .origin()?,
            ),
        };
        let (is, fd) = match origin {
            Some(Origin::Evdev(path)) => {
                let (is, fd) = uses.inputs.take(&path, kept.as_ref(), wanted)?;
                (is, Some(fd))
            }
            Some(Origin::Model(model)) => (model.spec(), None),
            None => (kept.clone().context("it has no settings")?, None),
        };
        // What the guest was told of it holds.
        let is = kept.unwrap_or(is);
        Ok(Opened {
            descriptors: fd.into_iter().collect(),
            kept: Some(spec(&is)),
            ..Opened::new(is.detail(), spec(&is))
        })
    }

    fn parts(&self) -> &'static [&'static str] {
        &[super::KEYS]
    }

    fn change(
        &self,
        order: Order,
        kept: Option<Value>,
        _backing: Option<Backing>,
    ) -> Result<Changed> {
        let Order::Input { events } = order else {
            bail!("a device of type {} has no {}", self.name(), order.part());
        };
        let is: Spec = serde_json::from_value(kept.context("nothing is recorded of it")?)?;
        let description = is.description();
        ensure!(
            events.len() <= MAX_EVENTS,
            "{} events are more than {MAX_EVENTS}",
            events.len()
        );
        for event in &events {
            let [of, code, _] = *event;
            let known =
                event_of(*event).filter(|event| *event == Event::REPORT || description.has(*event));
            ensure!(
                known.is_some(),
                "{} has no {}",
                is.name,
                event_name(of, code)
            );
        }
        Ok(Changed {
            done: format!("{} events handed on", events.len()),
            kept: None,
            change: spec(&events),
        })
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let built_by: Spec = serde_json::from_value(new.spec)?;
        let kept = StateCell::new(new.records.own(0, Input::KEPT)?);
        let source = new.descriptors.into_iter().next().map(Evdev::new);
        let device = Input::new(built_by.description(), source, kept, new.served)?;
        let injecting = device.injecting();
        Ok(Building::Ready(Built {
            device: Box::new(device),
            control: Some(Box::new(InputControl(injecting))),
            known: None,
        }))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        vec![SyscallRule {
            call: libc::SYS_ioctl,
            argument: Some((1, Evdev::calls().map(ioctl_number).collect())),
        }]
    }
}

/// As `linux/input-event-codes.h` has it.
fn event_name(of: i32, code: i32) -> String {
    let name = u16::try_from(of)
        .map(EventType)
        .ok()
        .zip(u16::try_from(code).ok());
    match name {
        Some((EventType::KEY, code)) => format!("{:?}", KeyCode(code)),
        Some((EventType::RELATIVE, code)) => format!("{:?}", RelativeAxisCode(code)),
        Some((EventType::ABSOLUTE, code)) => format!("{:?}", AbsoluteAxisCode(code)),
        _ => format!("event of type {of} and code {code}"),
    }
}

/// The event of a type, a code and a value.
fn event_of([of, code, value]: [i32; 3]) -> Option<Event> {
    Some(Event {
        kind: of.try_into().ok()?,
        code: code.try_into().ok()?,
        value,
    })
}

struct InputControl(Injecting);

impl Control for InputControl {
    fn change(&self, change: &Value, _descriptors: Vec<OwnedFd>) -> Result<()> {
        let events = Vec::<[i32; 3]>::deserialize(change)?;
        self.0
            .inject(events.into_iter().filter_map(event_of).collect());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_judged() {
        let check = |settings: &str| InputKind.check_settings(&settings.parse().unwrap());
        for good in [
            "evdev = \"/dev/input/by-id/wheel\"",
            "model = \"keyboard\"",
            "model = \"pointer\"",
        ] {
            check(good).unwrap();
        }
        for (settings, wrong) in [
            ("", "input has either evdev"),
            (
                "evdev = \"/e\"\nmodel = \"keyboard\"",
                "input has either evdev",
            ),
            ("evdev = \"event0\"", "event0 is no absolute path"),
            ("model = \"mouse\"", "unknown variant `mouse`"),
            ("evdev = 0", "integer"),
            ("model = \"keyboard\"\nname = \"k\"", "unknown field `name`"),
        ] {
            let error = check(settings).unwrap_err().to_string();
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }

    #[test]
    fn a_device_is_told_what_it_can_say() {
        let kept = || Some(spec(&Model::Pointer.spec()));
        let order = |events| InputKind.change(Order::Input { events }, kept(), None);
        let moved = vec![[3, 0, 100], [3, 1, 5], [0, 0, 0], [1, 0x110, 1], [0, 0, 0]];
        let changed = order(moved.clone()).unwrap();
        assert_eq!(
            (changed.done, changed.change),
            ("5 events handed on".to_owned(), spec(&moved))
        );
        for (events, wrong) in [
            (vec![[1, 30, 1]], "xen-virtio pointer has no KEY_A"),
            (vec![[65_539, 0, 0]], "type 65539 and code 0"),
            (vec![[3, -1, 0]], "code -1"),
            (vec![[0, 3, 0]], "type 0 and code 3"),
            (vec![[3, 0, 0]; 257], "257 events are more than 256"),
        ] {
            let error = order(events).err().unwrap().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        let refused = InputKind.change(Order::Resize, kept(), None);
        let error = refused.err().unwrap().to_string();
        assert_eq!(error, "a device of type input has no size");
    }
}
