//! What xl makes of one disk (xl-disk-configuration(5)).

use std::collections::HashMap;

/// The parameters that xl knows, and what each may be, if it is not free.
const PARAMETERS: [(&str, &[&str]); 15] = [
    ("access", &["", "r", "ro", "rw", "w"]),
    ("active-disk", &[]),
    ("backend", &[]),
    ("backendtype", &["phy", "qdisk", "standalone", "tap"]),
    ("colo-export", &[]),
    ("colo-host", &[]),
    ("colo-port", &[]),
    ("devtype", &["cdrom", "disk"]),
    ("format", &FORMATS),
    ("grant_usage", &["0", "1"]),
    ("hidden-disk", &[]),
    ("script", &[]),
    ("specification", &["virtio", "xen"]),
    ("target", &[]),
    ("vdev", &[]),
];

const FORMATS: [&str; 7] = ["", "empty", "qcow", "qcow2", "qed", "raw", "vhd"];

/// What has no value, and no effect here.
const FLAGS: [&str; 6] = [
    "direct-io-safe",
    "discard",
    "no-colo",
    "no-discard",
    "trusted",
    "untrusted",
];

/// What a target once began with, in place of a format.
const OLD_PREFIXES: [&str; 7] = ["aio", "file", "ioemu", "phy", "tap", "tap2", "tapdisk"];

/// What a value without a name is, in order; those that are named are left out.
const POSITIONAL: [&str; 4] = ["target", "format", "vdev", "access"];

/// A disk's parameters, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DiskLine<'a> {
    values: HashMap<&'static str, &'a str>,
    colo: bool,
}

impl<'a> DiskLine<'a> {
    /// # Errors
    ///
    /// What xl would refuse.
    pub(super) fn parse(line: &'a str) -> Result<Self, String> {
        let mut disk = Self::default();
        let mut rest = line.trim_start();
        while !rest.is_empty() {
            if let Some(target) = rest.strip_prefix("target=") {
                disk.set("target", target.strip_suffix(',').unwrap_or(target))?;
                break;
            }
            let (part, after) = rest.split_once(',').unwrap_or((rest, ""));
            rest = after.trim_start();
            match part.split_once('=') {
                Some((name, value)) => disk.set(name, value)?,
                None if part == "colo" => disk.colo = true,
                None if part == "cdrom" => disk.set("devtype", part)?,
                None if FLAGS.contains(&part) => {}
                None => disk.set_next(part)?,
            }
        }
        Ok(disk)
    }

    fn set(&mut self, name: &str, value: &'a str) -> Result<(), String> {
        let (name, values) = parameter(name).ok_or_else(|| format!("xl knows no {name:?}"))?;
        if !values.is_empty() && !values.contains(&value) {
            let values = values.join(", ");
            let values = values.trim_start_matches(", ");
            return Err(format!("{name}={value} is none of {values}"));
        }
        // Of what is one of a few words the last counts.
        match self.values.insert(name, value) {
            Some(earlier) if values.is_empty() && !earlier.is_empty() && earlier != value => {
                Err(format!("{name} is {earlier:?} and {value:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Sets what has no value yet of those that need no name.
    fn set_next(&mut self, value: &'a str) -> Result<(), String> {
        let next = POSITIONAL
            .iter()
            .find(|name| !self.values.contains_key(*name));
        match *next.ok_or_else(|| format!("{value:?} is one value too many"))? {
            "target" => self.set_target(value),
            "vdev" => self.set("vdev", value.split(':').next().unwrap_or(value)),
            name => self.set(name, value),
        }
    }

    /// Sets the target, which may have prefixes of old: formats, or words that stand for `raw`.
    fn set_target(&mut self, value: &'a str) -> Result<(), String> {
        let mut target = value;
        while let Some((prefix, rest)) = target.split_once(':') {
            if let Some(format) = FORMATS.into_iter().find(|format| *format == prefix) {
                self.set("format", format)?;
            } else if OLD_PREFIXES.contains(&prefix) {
                // It stands where a format would.
                self.values.entry("format").or_insert("raw");
            } else {
                break;
            }
            target = rest;
        }
        self.set("target", target)
    }

    /// The value of a parameter, if it has one.
    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.values
            .get(name)
            .copied()
            .filter(|value| !value.is_empty())
    }

    /// Whether it is for xen-virtiod, or is meant to be: what says so may have become a part of the path.
    pub(super) fn is_virtio(&self) -> bool {
        let swallowed = self.swallowed();
        self.get("specification") == Some("virtio")
            || self.get("backendtype") == Some("standalone")
            || swallowed.is_some_and(|part| part == "specification=virtio")
    }

    /// A parameter that xl takes for a part of the path.
    fn swallowed(&self) -> Option<&'a str> {
        let behind = self.get("target")?.split(',').skip(1);
        let is_parameter = |part: &&str| {
            let name = part.split_once('=').map(|(name, _)| name);
            name.is_some_and(|name| parameter(name).is_some())
        };
        behind.map(str::trim_start).find(is_parameter)
    }

    /// What libxl does not do for a back-end of its own.
    ///
    /// # Errors
    ///
    /// The parameter, and what to write.
    pub(super) fn check_standalone(&self) -> Result<(), String> {
        if self.get("specification") != Some("virtio") {
            return Err("has no specification=virtio, without which it is a PV disk".to_owned());
        }
        if let Some(kind) = self.get("backendtype").filter(|kind| *kind != "standalone") {
            return Err(format!(
                "backendtype={kind} does not go with specification=virtio: write backendtype=standalone"
            ));
        }
        if let Some(format) = self.get("format").filter(|format| *format != "raw") {
            return Err(format!(
                "format={format} is not served: an image must be raw"
            ));
        }
        if let Some(script) = self.get("script") {
            return Err(format!(
                "script={script} does not go with backendtype=standalone"
            ));
        }
        if self.colo {
            return Err("colo does not go with backendtype=standalone".to_owned());
        }
        check_backend(self.get("backend").unwrap_or_default())
    }

    pub(super) fn is_read_only(&self) -> bool {
        matches!(self.get("access"), Some("r" | "ro")) || self.get("devtype") == Some("cdrom")
    }

    /// The path of its file or block device.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn path(&self) -> Result<&'a str, String> {
        let target = self
            .get("target")
            .ok_or("has no target=, the path of its file or block device")?;
        if let Some(part) = self.swallowed() {
            return Err(format!(
                "target= must come last; xl takes {part} for a part of the path"
            ));
        }
        if target.trim() != target {
            return Err(format!(
                "xl takes the spaces in target={target:?} for a part of the path"
            ));
        }
        if !target.starts_with('/') {
            return Err(format!("target={target} is no absolute path"));
        }
        Ok(target)
    }
}

/// # Errors
///
/// For devices of another domain than dom0, which xen-virtiod there would serve.
pub(super) fn check_backend(domain: &str) -> Result<(), String> {
    match domain {
        "" | "0" | "Domain-0" => Ok(()),
        other => Err(format!(
            "backend={other} is not served: xen-virtiod serves from dom0"
        )),
    }
}

fn parameter(name: &str) -> Option<(&'static str, &'static [&'static str])> {
    PARAMETERS.into_iter().find(|(known, _)| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_positions_say_the_same() {
        let named = DiskLine::parse("format=raw,vdev=xvda,access=w,specification=virtio,target=/x")
            .unwrap();
        for line in [
            "/x,raw,xvda,w,specification=virtio",
            "specification=virtio, /x, raw, xvda, w",
            "raw:/x,xvda,w,specification=virtio",
            "format=raw, /x, xvda, specification=virtio, w",
            "vdev=xvda,discard,specification=virtio,/x,raw,w",
        ] {
            assert_eq!(DiskLine::parse(line).unwrap(), named, "{line}");
        }
        let with_comma = DiskLine::parse("vdev=xvda, target=/a, b").unwrap();
        assert_eq!(with_comma.path(), Ok("/a, b"));
        let phy = DiskLine::parse("phy:/x,xvda:disk,r").unwrap();
        assert!(phy.is_read_only(), "{phy:?}");
        assert_eq!(
            (phy.get("vdev"), phy.get("format")),
            (Some("xvda"), Some("raw"))
        );
        let by_path = DiskLine::parse("/dev/disk/by-path/pci-0000:00:1,raw,xvda,w").unwrap();
        assert_eq!(by_path.path(), Ok("/dev/disk/by-path/pci-0000:00:1"));
        let cdrom = DiskLine::parse("/x,,xvda,cdrom,access=w,access=rw").unwrap();
        assert!(cdrom.is_read_only(), "{cdrom:?}");
        let qcow2 = DiskLine::parse("tap:qcow2:/x,xvda,w").unwrap();
        assert_eq!(qcow2.get("format"), Some("qcow2"));
        let short = DiskLine::parse("/x,,xvda").unwrap();
        assert!(!short.is_read_only());
        assert_eq!(
            (short.get("format"), short.get("vdev")),
            (None, Some("xvda"))
        );
    }

    #[test]
    fn what_xl_refuses_is_refused() {
        for (line, expected) in [
            ("/x,raw,xvda,w,more", "\"more\" is one value too many"),
            ("access=wr,target=/x", "access=wr is none of r, ro, rw, w"),
            (
                "grant_usage=yes,target=/x",
                "grant_usage=yes is none of 0, 1",
            ),
            (
                "specification=virtoi,target=/x",
                "specification=virtoi is none of virtio, xen",
            ),
            (
                "specificaton=virtio,target=/x",
                "xl knows no \"specificaton\"",
            ),
            ("vdev=xvda,vdev=xvdb", "vdev is \"xvda\" and \"xvdb\""),
            ("/x,qcow3,xvda", "format=qcow3 is none of empty, "),
        ] {
            assert!(
                DiskLine::parse(line).unwrap_err().contains(expected),
                "{line}"
            );
        }
        for (target, expected) in [
            ("", "has no target="),
            (" /x", "takes the spaces"),
            ("/x ", "takes the spaces"),
            ("x.img", "no absolute path"),
            ("/x, vdev=xvda", "must come last; xl takes vdev=xvda for"),
        ] {
            let line = format!("target={target}");
            let error = DiskLine::parse(&line).unwrap().path().unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_judged(text: String, known in "(target=|vdev=|/x|,| |raw|:|=){0,12}") {
            for line in [text, known] {
                if let Ok(disk) = DiskLine::parse(&line) {
                    let _ = disk.path();
                }
            }
        }
    }
}
