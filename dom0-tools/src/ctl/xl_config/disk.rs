//! What xl reads in one line of `disk = [ … ]` (xl-disk-configuration(5)).

mod parts;

use super::c_number::{Radix, c_number};
use parts::Part;
use std::collections::HashMap;

const FORMATS: [&str; 6] = ["empty", "qcow", "qcow2", "qed", "raw", "vhd"];
const BACKEND_TYPES: [&str; 4] = ["phy", "qdisk", "standalone", "tap"];
const SPECIFICATIONS: [&str; 2] = ["virtio", "xen"];

/// A disk, as Xen 4.19 and later read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLine {
    /// What may be any text, by its parameter's name.
    texts: HashMap<&'static str, String>,
    format: Option<&'static str>,
    backend_type: Option<&'static str>,
    specification: Option<&'static str>,
    writable: bool,
    cdrom: bool,
    colo: bool,
    grants: Option<bool>,
}

impl DiskLine {
    /// # Errors
    ///
    /// What xl would refuse.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut reader = Reader::default();
        let mut rest = line;
        while !rest.is_empty() {
            let (part, behind) = parts::first(rest);
            reader.take(part, behind)?;
            rest = behind;
        }
        reader.finish()
    }

    pub fn target(&self) -> Option<&str> {
        self.text("target")
    }

    pub fn vdev(&self) -> &str {
        self.text("vdev").unwrap_or_default()
    }

    pub fn script(&self) -> Option<&str> {
        self.text("script")
    }

    /// The domain that serves it.
    pub fn backend(&self) -> Option<&str> {
        self.text("backend")
    }

    pub fn format(&self) -> &'static str {
        self.format.unwrap_or("raw")
    }

    pub fn backend_type(&self) -> Option<&'static str> {
        self.backend_type
    }

    pub fn specification(&self) -> Option<&'static str> {
        self.specification
    }

    pub fn is_writable(&self) -> bool {
        self.writable
    }

    pub fn is_cdrom(&self) -> bool {
        self.cdrom
    }

    pub fn has_colo(&self) -> bool {
        self.colo
    }

    /// What `grant_usage=` says.
    pub fn grants(&self) -> Option<bool> {
        self.grants
    }

    /// The parameters that xl takes for a part of the path.
    pub(super) fn swallowed(&self) -> impl Iterator<Item = &str> {
        let behind = self.target().unwrap_or_default().split(',').skip(1);
        behind
            .map(str::trim_start)
            .filter(|part| parts::begins_with_parameter(part))
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.texts.get(name).map(String::as_str)
    }
}

struct Reader {
    disk: DiskLine,
    /// A prefix stands where a format would.
    has_prefix: bool,
    /// An access that a parameter says has no place.
    has_access: bool,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            disk: DiskLine {
                texts: HashMap::new(),
                format: None,
                backend_type: None,
                specification: None,
                writable: true,
                cdrom: false,
                colo: false,
                grants: None,
            },
            has_prefix: false,
            has_access: false,
        }
    }
}

impl Reader {
    /// Takes a part, with what is `behind` it.
    fn take(&mut self, part: Part<'_>, behind: &str) -> Result<(), String> {
        match part {
            Part::Blank => Ok(()),
            Part::Named(name, value) => self.set(name, value),
            Part::Flag(flag) => {
                self.set_flag(flag);
                Ok(())
            }
            Part::Prefix(prefix) => self.set_prefix(prefix),
            Part::UnknownName("grant_usage", value) => {
                Err(none_of("grant_usage", value, &["0", "1"]))
            }
            Part::UnknownName(name, _) => Err(format!("xl knows no {name:?}")),
            Part::UnknownPrefix(prefix) => Err(format!(
                "xl knows no prefix {prefix}: write a path that begins so behind target="
            )),
            Part::Positional(value) => self.set_next(value),
            // xl leaves out an equals sign that is the last byte.
            Part::Stray if behind.is_empty() => Ok(()),
            Part::Stray => Err("an = has no name before it: remove it".to_owned()),
        }
    }

    fn set(&mut self, name: &'static str, value: &str) -> Result<(), String> {
        match name {
            "access" => self.set_access(value),
            "format" => self.set_format(value),
            "backendtype" => set_word(&mut self.disk.backend_type, name, value, &BACKEND_TYPES),
            "specification" => set_word(&mut self.disk.specification, name, value, &SPECIFICATIONS),
            "devtype" => self.set_device_type(value),
            "grant_usage" => {
                self.disk.grants = Some(value == "1");
                Ok(())
            }
            "colo-port" => {
                let number = c_number(value.as_bytes(), Radix::Ten).map_or(0, |(number, _)| number);
                // xl keeps 32 bits of it.
                if number & 0xffff_ffff == 0 {
                    return Err(format!("colo-port={value} is no port"));
                }
                Ok(())
            }
            name => self.set_text(name, value),
        }
    }

    fn set_flag(&mut self, flag: &str) {
        match flag {
            "cdrom" => self.disk.cdrom = true,
            "colo" => self.disk.colo = true,
            "no-colo" => self.disk.colo = false,
            // No effect here.
            _ => {}
        }
    }

    fn set_prefix(&mut self, prefix: &str) -> Result<(), String> {
        self.has_prefix = true;
        match prefix {
            "qcow" | "qcow2" | "raw" | "vhd" => self.set_format(prefix),
            "drbd" | "enbd" | "iscsi" | "nbd" => {
                self.set_text("script", &format!("block-{prefix}"))
            }
            _ => Ok(()),
        }
    }

    /// Sets what has no value yet of those that need no name: target, format, vdev, access.
    fn set_next(&mut self, value: &str) -> Result<(), String> {
        let Some(target) = self.disk.target() else {
            return self.set_text("target", value);
        };
        let has_target = !target.is_empty();
        let with_type = value.rsplit_once(':');
        if !self.has_prefix && self.disk.format.is_none() {
            // A drive without a disk may leave out its format.
            if let Some((vdev, device_type)) = with_type
                && !has_target
            {
                self.set_text("vdev", vdev)?;
                self.set_device_type(device_type)?;
                return self.set_format("empty");
            }
            return self.set_format(value);
        }
        if self.disk.text("vdev").is_none() {
            if let Some((vdev, device_type)) = with_type {
                self.set_text("vdev", vdev)?;
                return self.set_device_type(device_type);
            }
            return self.set_text("vdev", value);
        }
        if self.has_access {
            return Err(format!(
                "{value:?} is one value too many: by their place xl takes a target, a format, a vdev and an access"
            ));
        }
        self.has_access = true;
        self.set_access(value)
    }

    fn set_text(&mut self, name: &'static str, value: &str) -> Result<(), String> {
        match self.disk.text(name) {
            Some(earlier) if !earlier.is_empty() => Err(format!(
                "{name} is there twice, as {earlier:?} and {value:?}: remove one"
            )),
            _ => {
                self.disk.texts.insert(name, value.to_owned());
                Ok(())
            }
        }
    }

    fn set_format(&mut self, value: &str) -> Result<(), String> {
        let value = if value.is_empty() { "raw" } else { value };
        set_word(&mut self.disk.format, "format", value, &FORMATS)
    }

    fn set_access(&mut self, value: &str) -> Result<(), String> {
        self.disk.writable = match value {
            "r" | "ro" => false,
            "" | "rw" | "w" => true,
            _ => return Err(none_of("access", value, &["r", "ro", "rw", "w"])),
        };
        Ok(())
    }

    fn set_device_type(&mut self, value: &str) -> Result<(), String> {
        self.disk.cdrom = match value {
            "cdrom" => true,
            "disk" => false,
            _ => return Err(none_of("devtype", value, &["cdrom", "disk"])),
        };
        Ok(())
    }

    fn finish(mut self) -> Result<DiskLine, String> {
        self.disk.format = Some(self.disk.format());
        if self.disk.cdrom {
            self.disk.writable = false;
            if self.disk.target().unwrap_or_default().is_empty() {
                self.disk.format = Some("empty");
            }
        }
        if self.disk.text("vdev").is_none() {
            let swallowed = self.disk.swallowed().next().map(must_come_last);
            return Err(swallowed.unwrap_or_else(|| "has no vdev=, like vdev=xvda".to_owned()));
        }
        if self.disk.target().is_none() && !self.disk.cdrom {
            return Err("has no target=, the path of its file or block device".to_owned());
        }
        Ok(self.disk)
    }
}

/// What is wrong with a target that has the parameter `swallowed` in it.
pub(super) fn must_come_last(swallowed: &str) -> String {
    format!("target= must come last; xl takes {swallowed} for a part of the path")
}

/// Sets one of a few words, which may be said again but not changed.
fn set_word(
    slot: &mut Option<&'static str>,
    name: &str,
    value: &str,
    words: &[&'static str],
) -> Result<(), String> {
    let word = words.iter().copied().find(|word| *word == value);
    let word = word.ok_or_else(|| none_of(name, value, words))?;
    match *slot {
        Some(earlier) if earlier != word => Err(format!(
            "{name} is there twice, as {earlier:?} and {word:?}: remove one"
        )),
        _ => {
            *slot = Some(word);
            Ok(())
        }
    }
}

fn none_of(name: &str, value: &str, words: &[&str]) -> String {
    format!("{name}={value} is none of {}", words.join(", "))
}

#[cfg(test)]
mod tests;
