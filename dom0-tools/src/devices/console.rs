//! A console: ports whose other ends are pseudoterminals, sockets, logs, and whoever runs `xen-virtioctl console`.

mod ends;
mod log;
mod pty;

pub(crate) use ends::{Consoles, PortEnds};

use super::{
    Building, Built, Changed, Control, DeviceKind, Listen, NewDevice, Opened, Order, PORTS,
    Resources, SyscallRule, Wanted, ioctl_number, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state::{self, Backing};
use anyhow::{Context, Result, bail, ensure};
use ends::Ends;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::path::{Component, PathBuf};
use xen_virtio_backend::console::{Attaching, Console, Line, MAX_PORTS};
use xen_virtio_backend::{DeviceType, StateCell};

/// The most descriptors that such a device is opened with.
pub(crate) const MAX_DESCRIPTORS: usize = MAX_PORTS * PortEnds::MAX_DESCRIPTORS;

/// Linux keeps names of any length; a link of this name is made in the guest.
const MAX_NAME: usize = 64;

pub(super) struct ConsoleKind;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Settings {
    pty: Option<PathBuf>,
    listen: Option<PathBuf>,
    log: Option<PathBuf>,
    log_kib: Option<NonZeroU32>,
    /// Those behind the first one.
    #[serde(default)]
    ports: Vec<PortSettings>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct PortSettings {
    name: Option<String>,
    pty: Option<PathBuf>,
    listen: Option<PathBuf>,
    log: Option<PathBuf>,
    log_kib: Option<NonZeroU32>,
}

/// What the guest has had it with, and what a worker builds it by.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Spec {
    ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Port {
    name: Option<String>,
    #[serde(flatten)]
    ends: Ends,
    /// Which of its ends come with descriptors, for a worker.
    #[serde(default)]
    opened: PortEnds,
}

impl Settings {
    fn ports(self) -> Result<Vec<Port>> {
        let first = PortSettings {
            name: None,
            pty: self.pty,
            listen: self.listen,
            log: self.log,
            log_kib: self.log_kib,
        };
        let count = 1 + self.ports.len();
        ensure!(
            count <= MAX_PORTS,
            "{count} ports are more than {MAX_PORTS}"
        );
        let ports = std::iter::once(first).chain(self.ports);
        let ports: Vec<_> = ports.map(PortSettings::port).collect::<Result<_>>()?;
        let mut names: Vec<_> = ports.iter().filter_map(|port| port.name.as_ref()).collect();
        let paths: Vec<_> = ports.iter().flat_map(|port| port.ends.paths()).collect();
        for (index, path) in paths.iter().enumerate() {
            ensure!(
                !paths[..index].contains(path),
                "{} is there twice",
                path.display()
            );
        }
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("two ports have the name {:?}", twice[0]);
        }
        Ok(ports)
    }
}

impl PortSettings {
    fn port(self) -> Result<Port> {
        if let Some(name) = &self.name {
            let is_odd = |letter: char| letter.is_control() || letter == '/';
            ensure!(
                (1..=MAX_NAME).contains(&name.len()) && !name.contains(is_odd),
                "name = {name:?} is no name of a port: up to {MAX_NAME} bytes, and no slash"
            );
            ensure!(
                name.parse::<usize>().is_err(),
                "name = {name:?} is a number, which ports have anyhow"
            );
            ensure!(
                self.log.is_none(),
                "{name} is a channel, whose bytes are for whoever is there: it has no log"
            );
        }
        ensure!(
            self.log.is_some() || self.log_kib.is_none(),
            "log-kib is for a log, and there is no log"
        );
        let ends = Ends {
            pty: self.pty,
            listen: self.listen,
            log_kib: self.log.is_some().then(|| {
                let default = NonZeroU32::new(log::DEFAULT_KIB).expect("some");
                self.log_kib.unwrap_or(default)
            }),
            log: self.log,
        };
        for path in ends.paths() {
            ensure!(path.is_absolute(), "{} is no absolute path", path.display());
            // One place has one name here.
            ensure!(
                !path.components().any(|part| part == Component::ParentDir),
                "{} has .. in it",
                path.display()
            );
        }
        Ok(Port {
            name: self.name,
            ends,
            opened: PortEnds::default(),
        })
    }
}

impl Spec {
    fn names(&self) -> Vec<Option<String>> {
        self.ports.iter().map(|port| port.name.clone()).collect()
    }

    /// The port of this number, or of this name.
    fn port(&self, wanted: &str) -> Result<usize> {
        let named = |port: &Port| port.name.as_deref() == Some(wanted);
        let number = wanted.parse().ok().filter(|port| *port < self.ports.len());
        let found = number.or_else(|| self.ports.iter().position(named));
        found.with_context(|| {
            let names = self.ports.iter().enumerate().map(|(number, port)| {
                let name = port.name.as_ref();
                name.map_or_else(|| number.to_string(), |name| format!("{number} ({name})"))
            });
            let names: Vec<_> = names.collect();
            format!("it has no port {wanted}, but {}", names.join(", "))
        })
    }

    fn detail(&self) -> String {
        let mut detail = "console".to_owned();
        if self.ports.len() > 1 {
            detail += &format!(" with {} ports", self.ports.len());
        }
        for (number, port) in self.ports.iter().enumerate() {
            for end in port.ends.named() {
                detail += &match number {
                    0 => format!(", {end}"),
                    number => format!(", {number}: {end}"),
                };
            }
        }
        detail
    }
}

impl DeviceKind for ConsoleKind {
    fn device_type(&self) -> DeviceType {
        Console::DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        super::feature_names::of(Console::DEVICE_TYPE.0)
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_CONSOLE")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        let ports = parse_settings::<Settings>(settings).and_then(Settings::ports);
        let ports = ports.unwrap_or_default();
        let paths = ports.iter().flat_map(|port| port.ends.paths());
        let folders: BTreeSet<_> = paths
            .filter_map(|path| Some(path.parent()?.to_owned()))
            .collect();
        let missing = folders.iter().filter(|folder| !folder.is_dir());
        missing
            .map(|folder| format!("there is no folder {}", folder.display()))
            .collect()
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<Settings>(settings)?.ports().map(drop)
    }

    fn state_bytes(&self, spec: &Value) -> usize {
        let names = Spec::deserialize(spec).map_or_else(|_| vec![None], |spec| spec.names());
        let mut own = vec![Console::HISTORY_BYTES; names.len()];
        own.push(Console::kept_bytes(names.len()));
        guest_state::device_bytes(&own, &Console::queue_sizes(&names))
    }

    fn open(&self, wanted: &Wanted<'_>, uses: &mut Uses) -> Result<Opened> {
        let mut built_by = match wanted.kept.clone() {
            Some(kept) => serde_json::from_value(kept)?,
            None => {
                let settings: Option<Settings> = wanted.settings()?;
                let nothing = || parse_settings(&toml::Table::new());
                let settings = settings.map_or_else(nothing, Ok)?;
                Spec {
                    ports: settings.ports()?,
                }
            }
        };
        let kept = spec(&built_by);
        let (mut descriptors, mut listens) = (Vec::new(), Vec::new());
        for (number, port) in built_by.ports.iter_mut().enumerate() {
            let user = (wanted.guest, wanted.name, wanted.key);
            let (opened, found) =
                port.ends
                    .open(user, number, wanted.served, &mut uses.consoles)?;
            port.opened = opened;
            descriptors.extend(found);
            listens.extend(port.ends.listen.clone().map(|path| Listen {
                path,
                change: spec(&Attachment::Stream { port: number }),
            }));
        }
        Ok(Opened {
            descriptors,
            kept: Some(kept),
            listens,
            ..Opened::new(built_by.detail(), spec(&built_by))
        })
    }

    fn parts(&self) -> &'static [&'static str] {
        &[PORTS]
    }

    fn change(
        &self,
        order: Order,
        kept: Option<Value>,
        _backing: Option<Backing>,
    ) -> Result<Changed> {
        let Order::Attach { port, from } = order else {
            bail!("a device of type {} has no {}", self.name(), order.part());
        };
        let kept = kept.context("nothing is recorded of it")?;
        let number = Spec::deserialize(kept)?.port(&port)?;
        Ok(Changed {
            done: format!("attached to port {number}"),
            kept: None,
            change: spec(&Attachment::Messages { port: number, from }),
        })
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let built_by: Spec = serde_json::from_value(new.spec)?;
        let names = built_by.names();
        let kept = new.records.own(0, Console::kept_bytes(names.len()))?;
        let histories = (1..).take(names.len());
        let histories = histories.map(|index| new.records.own(index, Console::HISTORY_BYTES));
        let histories = histories.collect::<Result<_, _>>()?;
        let device = Console::new(names, StateCell::new(kept), histories)?;
        let attaching = device.attaching();
        let mut descriptors = new.descriptors.into_iter();
        for (number, port) in built_by.ports.iter().enumerate() {
            for line in port.opened.lines(&mut descriptors)? {
                attaching.attach(number, line);
            }
        }
        Ok(Building::Ready(Built {
            device: Box::new(device),
            control: Some(Box::new(ConsoleControl(attaching))),
            known: None,
        }))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        vec![SyscallRule {
            call: libc::SYS_ioctl,
            argument: Some((1, vec![ioctl_number(libc::FIONREAD)])),
        }]
    }
}

/// How a descriptor that comes to a device is attached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Attachment {
    Stream { port: usize },
    Messages { port: usize, from: Option<u64> },
}

struct ConsoleControl(Attaching);

impl Control for ConsoleControl {
    fn change(&self, change: &Value, descriptors: Vec<OwnedFd>) -> Result<()> {
        let attachment = Attachment::deserialize(change)?;
        let socket = descriptors.into_iter().next();
        let socket = socket.context("no descriptor came with whom to attach")?;
        match attachment {
            Attachment::Stream { port } => self.0.attach(port, Line::Stream(socket)),
            Attachment::Messages { port, from } => {
                self.0.attach(port, Line::Messages { socket, from });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec_of(settings: &str) -> Spec {
        let settings: Settings = toml::from_str(settings).unwrap();
        Spec {
            ports: settings.ports().unwrap(),
        }
    }

    #[test]
    fn a_port_goes_by_its_number_or_its_name() {
        let console = spec_of("log = \"/l\"\n[[ports]]\nname = \"agent\"\n[[ports]]\npty = \"/p\"");
        let found = ["0", "1", "agent", "2"].map(|port| console.port(port).unwrap());
        assert_eq!(found, [0, 1, 1, 2]);
        let error = console.port("3").unwrap_err().to_string();
        assert_eq!(error, "it has no port 3, but 0, 1 (agent), 2");
        assert_eq!(console.detail(), "console with 3 ports, log /l, 2: pty /p");
        let order = Order::Attach {
            port: "agent".to_owned(),
            from: Some(7),
        };
        let changed = ConsoleKind
            .change(order, Some(spec(&console)), None)
            .unwrap();
        let expected = serde_json::json!({"messages": {"port": 1, "from": 7}});
        assert_eq!((changed.change, changed.kept), (expected, None));
        let refused = ConsoleKind.change(Order::Resize, Some(spec(&console)), None);
        let error = refused.err().unwrap().to_string();
        assert_eq!(error, "a device of type console has no size");
    }

    #[test]
    fn what_is_kept_of_it_is_what_the_guest_has() {
        let console = spec_of("log = \"/l\"\nlog-kib = 64\n[[ports]]\nname = \"agent\"");
        let kept = spec(&console);
        let read: Spec = serde_json::from_value(kept.clone()).unwrap();
        assert_eq!(read.ports, console.ports);
        let larger = ConsoleKind.state_bytes(&kept);
        assert!(larger > ConsoleKind.state_bytes(&spec(&spec_of(""))));
    }

    #[test]
    fn settings_are_judged() {
        let check = |settings: &str| ConsoleKind.check_settings(&settings.parse().unwrap());
        for good in [
            "",
            "pty = \"/run/p\"\nlisten = \"/run/s\"\nlog = \"/var/log/l\"\nlog-kib = 1",
            "[[ports]]\nname = \"org.qemu.guest_agent.0\"\nlisten = \"/run/s\"",
            &"[[ports]]\n".repeat(7),
        ] {
            check(good).unwrap();
        }
        let port = "[[ports]]\n";
        for (settings, wrong) in [
            ("pty = \"run/p\"".to_owned(), "run/p is no absolute path"),
            ("listen = \"s\"".to_owned(), "s is no absolute path"),
            ("log = \"\"".to_owned(), "no absolute path"),
            ("log-kib = 5".to_owned(), "there is no log"),
            ("log = \"/l\"\nlog-kib = 0".to_owned(), "zero"),
            (
                "log = \"/l\"\nlisten = \"/l\"".to_owned(),
                "/l is there twice",
            ),
            ("path = \"/l\"".to_owned(), "unknown field `path`"),
            ("log = \"/a/../l\"".to_owned(), "has .. in it"),
            (
                "log = \"/l\"\npty = \"/l.1\"".to_owned(),
                "/l.1 is there twice",
            ),
            ("pty = true".to_owned(), "boolean"),
            (port.repeat(8), "9 ports are more than 8"),
            (format!("{port}name = \"\""), "no name of a port"),
            (format!("{port}name = \"a/b\""), "no slash"),
            (format!("{port}name = \"a\\n\""), "no name of a port"),
            (format!("{port}name = \"1\""), "is a number"),
            (format!("{port}name = \"a\"\nlog = \"/l\""), "it has no log"),
            (
                format!("{port}name = \"a\"\n{port}name = \"a\""),
                "two ports",
            ),
            (format!("{port}nam = \"a\""), "unknown field `nam`"),
        ] {
            let error = format!("{:#}", check(&settings).unwrap_err());
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }
}
