//! A line of `xen_virtio = [ … ]`, which xl leaves alone: `fs, tag=share, socket=/run/virtiofsd/g.sock`.

use crate::devices::{self, Service};
use xen_virtio_backend::DeviceType;

/// A device that `xen-virtioctl create` gives a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnLine {
    /// The name of its kind.
    pub kind: &'static str,
    /// A virtio device type number.
    pub device_type: u32,
    service: Service,
    /// As xl has it; nothing, if the line says nothing of it.
    grant_usage: Option<bool>,
    /// What a device of its kind is made of.
    pub settings: toml::Table,
}

impl OwnLine {
    /// # Errors
    ///
    /// What is wrong with it, and what was expected.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut parts = line.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let mut settings = toml::Table::new();
        let mut grant_usage = None;
        for part in parts.filter(|part| !part.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()))
                .ok_or_else(|| format!("{part:?} is not like key=value"))?;
            if matches!(key, "grant_usage" | "grant-usage") {
                grant_usage = match value {
                    "0" => Some(false),
                    "1" => Some(true),
                    _ => return Err(format!("{key}={value} is neither 0 nor 1")),
                };
                continue;
            }
            let value = match key {
                // Its digits are no number.
                "serial" => value.into(),
                _ => typed(value),
            };
            let is_new = settings.insert(key.replace('_', "-"), value);
            if is_new.is_some() {
                return Err(format!("{key}= is there twice"));
            }
        }
        let kind = devices::kind_named(name, &settings)?;
        kind.check_settings(&settings)
            .map_err(|error| format!("{name}: {error:#}"))?;
        Ok(Self {
            kind: kind.name(),
            device_type: kind.device_type().0,
            service: Service::of(&settings),
            grant_usage,
            settings,
        })
    }

    /// Whether its memory is granted: unless it is told otherwise.
    pub fn grants(&self) -> bool {
        self.grant_usage.unwrap_or(true)
    }

    /// As [`OwnLine::grants`], if it is told.
    pub fn says_grants(&self) -> Option<bool> {
        self.grant_usage
    }

    /// What it will not be served for, as dom0 is now.
    pub fn warnings(&self) -> Vec<String> {
        let kind = devices::kind(self.device_type, self.service);
        kind.map_or_else(|_| Vec::new(), |kind| kind.warnings(&self.settings))
    }

    /// Whether it is a disk that we serve.
    pub fn is_own_disk(&self) -> bool {
        self.device_type == DeviceType::BLOCK.0 && self.service == Service::Own
    }

    /// What xl is told of it.
    pub fn xl_line(&self) -> String {
        format!(
            "type=virtio,device{:x}, transport=mmio, grant_usage={}",
            self.device_type,
            u8::from(self.grants())
        )
    }
}

/// A number, a truth value, or a text.
fn typed(value: &str) -> toml::Value {
    match value {
        "true" => true.into(),
        "false" => false.into(),
        _ => value
            .parse::<i64>()
            .map_or_else(|_| value.into(), toml::Value::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_kind_and_its_settings() {
        let line = OwnLine::parse("fs, tag=share,socket=/run/g.sock , pool_kib=4096").unwrap();
        assert_eq!((line.kind, line.device_type), ("fs", 26));
        assert_eq!(line.settings["tag"].as_str(), Some("share"));
        assert_eq!(line.settings["pool-kib"].as_integer(), Some(4096));
        assert_eq!(
            line.xl_line(),
            "type=virtio,device1a, transport=mmio, grant_usage=1"
        );
        let line = OwnLine::parse("blk, path=/dev/vg/g, read-only=true, grant_usage=0").unwrap();
        assert_eq!(line.settings["read-only"].as_bool(), Some(true));
        assert!(
            line.xl_line()
                .ends_with("device2, transport=mmio, grant_usage=0")
        );
        assert_eq!(OwnLine::parse("rng").unwrap().settings.len(), 0);
        let line = OwnLine::parse("blk, path=/a, serial=0042").unwrap();
        assert_eq!(line.settings["serial"].as_str(), Some("0042"));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_expected() {
        for (line, expected) in [
            ("", "\"\" is none of blk, console, empty, fs, gpio"),
            (
                "fss, socket=/g",
                "\"fss\" is none of blk, console, empty, fs, gpio",
            ),
            ("fs tag=share", "between settings is a comma"),
            (
                "fs, tag=share, sockt=/g",
                "fs needs socket = where its back-end listens; it has sockt, tag",
            ),
            ("fs", "it has nothing"),
            ("net, mac=x", "needs tap = the interface in dom0"),
            (
                "gpio, vhost=true",
                "\"gpio\" is none of net, vsock, which dom0's kernel",
            ),
            ("fs, socket=run/g.sock", "no absolute path"),
            ("fs, socket=/g, tga=share", "unknown field `tga`"),
            ("fs, socket=/g, tag", "\"tag\" is not like key=value"),
            ("fs, socket=/g, socket=/h", "socket= is there twice"),
            ("rng, grant_usage=yes", "grant_usage=yes is neither 0 nor 1"),
            ("blk, path=/a, read_only=maybe", "boolean in `read-only`"),
            (
                "blk, path=/a, serial=a b",
                "serial = \"a b\" is not 1 to 20",
            ),
            ("blk, path=/a, serial=", "serial = \"\" is not 1 to 20"),
            (
                "input, model=mouse",
                "`mouse`, expected `keyboard` or `pointer` in `model`",
            ),
        ] {
            let error = OwnLine::parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
