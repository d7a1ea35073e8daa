//! What is said of a network interface by whoever configures it.

use super::interfaces::{exists, missing};
use crate::devices::vhost_user::parse_mac;
use anyhow::{Result, bail, ensure};
use serde::Deserialize;
use std::num::NonZeroU64;
use std::path::PathBuf;
use xen_virtio_backend::net::MAX_PAIRS;

/// The setting that names the interface.
pub(in crate::devices) const TAP: &str = "tap";
/// Those that have one made.
pub(super) const BRIDGE: &str = "bridge";
pub(super) const SCRIPT: &str = "script";
pub(super) const NEEDS: &str =
    "tap = the interface in dom0, or bridge = the one that an interface is made for";
/// The smallest size of a packet that may be the largest: what any host takes (RFC 791).
const MIN_MTU: u16 = 68;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Settings {
    /// The name of an interface that is there.
    pub(super) tap: Option<String>,
    /// The bridge that one is made for,
    pub(super) bridge: Option<String>,
    /// … the script that gives it to that,
    pub(super) script: Option<PathBuf>,
    /// … and what that is told of the guest's addresses.
    pub(super) ip: Option<String>,
    /// The guest's address.
    pub(super) mac: String,
    /// The largest packet that it takes.
    pub(super) mtu: Option<u16>,
    /// Pairs of queues.
    #[serde(default = "one")]
    pub(super) queues: u16,
    /// The kernel does not serve it: with `true`, it is a device of another kind.
    #[serde(default, rename = "vhost")]
    _vhost: bool,
    pub(super) send_bytes_per_second: Option<NonZeroU64>,
    pub(super) send_frames_per_second: Option<NonZeroU64>,
    pub(super) receive_bytes_per_second: Option<NonZeroU64>,
    pub(super) receive_frames_per_second: Option<NonZeroU64>,
}

fn one() -> u16 {
    1
}

impl Settings {
    pub(super) fn check(self) -> Result<Self> {
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
pub(in crate::devices) fn check_name(key: &str, name: &str) -> Result<()> {
    let odd = |letter: char| letter.is_whitespace() || matches!(letter, '/' | ':' | '%');
    let is_dots = matches!(name, "." | "..");
    ensure!(
        (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(odd) && !is_dots,
        "{key} = {name:?} is no interface's name"
    );
    Ok(())
}

pub(in crate::devices) fn check_mtu(mtu: Option<u16>) -> Result<()> {
    let mtu = mtu.unwrap_or(MIN_MTU);
    ensure!(mtu >= MIN_MTU, "mtu = {mtu} is less than {MIN_MTU}");
    Ok(())
}

/// What a device whose settings name `tap` will not be served for, as dom0 is now.
pub(in crate::devices) fn warnings(settings: &toml::Table) -> Vec<String> {
    let tap = settings.get(TAP).and_then(toml::Value::as_str);
    let queues = settings.get("queues").and_then(toml::Value::as_integer);
    let missing = tap.and_then(|tap| missing(tap, queues > Some(1)));
    let bridge = settings.get(BRIDGE).and_then(toml::Value::as_str);
    let bridge = bridge.and_then(missing_bridge);
    missing.into_iter().chain(bridge).collect()
}

/// Says how the bridge `name` is made, if it is not there.
pub(super) fn missing_bridge(name: &str) -> Option<String> {
    (!exists(name)).then(|| format!("there is no bridge {name}: ip link add {name} type bridge"))
}

#[cfg(test)]
mod tests {
    use super::super::NetKind;
    use crate::devices::DeviceKind;

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
