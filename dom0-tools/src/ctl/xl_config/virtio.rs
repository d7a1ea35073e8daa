//! What xl reads in one line of `virtio = [ … ]` (xl.cfg(5)), and what is served of it.

use super::c_number::{Radix, c_number};
use super::standalone::check_backend;

/// A device's parameters. What is there twice counts as it is there last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct VirtioLine {
    kind: Option<String>,
    is_mmio: bool,
    grant_usage: Option<String>,
    backend: Option<String>,
}

impl VirtioLine {
    /// # Errors
    ///
    /// What xl would refuse.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        let mut device = Self::default();
        let mut parts = line.split(',').filter(|part| !part.is_empty());
        while let Some(part) = parts.next() {
            match part.trim_start_matches(' ').split_once('=') {
                // The type has a comma in it: `type=virtio,device2`.
                Some(("type", kind)) if kind.starts_with("virtio") => {
                    let rest = parts.next().ok_or_else(|| {
                        format!(
                            "type={kind} ends the line, and xl crashes on it: write type=virtio,device2"
                        )
                    })?;
                    device.kind = Some(format!("{kind},{rest}"));
                }
                Some(("type", kind)) => device.kind = Some(kind.to_owned()),
                Some(("transport", name)) if name.eq_ignore_ascii_case("mmio") => {
                    device.is_mmio = true;
                }
                Some(("transport", name)) if name.eq_ignore_ascii_case("unknown") => {
                    device.is_mmio = false;
                }
                Some(("transport", name)) => {
                    return Err(format!("transport={name} is not served, only mmio is"));
                }
                Some(("grant_usage", value)) => device.grant_usage = Some(value.to_owned()),
                Some(("backend", domain)) => device.backend = Some(domain.to_owned()),
                _ => return Err(format!("xl knows no {part:?}")),
            }
        }
        Ok(device)
    }

    /// Whether libxl makes a virtio-mmio device of it.
    pub(super) fn is_mmio(&self) -> bool {
        self.is_mmio
    }

    pub(super) fn grants(&self) -> bool {
        let number = |value: &String| c_number(value.as_bytes(), Radix::ByPrefix);
        self.grant_usage
            .as_ref()
            .and_then(number)
            .is_some_and(|(number, _)| number != 0)
    }

    /// Its virtio device type (virtio 1.3, section 5).
    ///
    /// # Errors
    ///
    /// What libxl or xen-virtiod does not do.
    pub(super) fn device_type(&self) -> Result<u32, String> {
        if !self.is_mmio {
            return Err("has no transport=mmio".to_owned());
        }
        check_backend(self.backend.as_deref().unwrap_or_default())?;
        if let Some(value) = &self.grant_usage {
            let len = c_number(value.as_bytes(), Radix::ByPrefix).map_or(0, |(_, len)| len);
            if len == 0 || len < value.len() {
                let taken_for = u8::from(self.grants());
                return Err(format!(
                    "xl takes grant_usage={value} for {taken_for}: write grant_usage=0 or grant_usage=1"
                ));
            }
        }
        let like = "virtio,device and a number in hexadecimal, like type=virtio,device2";
        let Some(kind) = &self.kind else {
            return Err(format!("has no type={like}"));
        };
        kind.strip_prefix("virtio,device")
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .ok_or_else(|| format!("type={kind} is not {like}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device_type(line: &str) -> Result<u32, String> {
        VirtioLine::parse(line)?.device_type()
    }

    #[test]
    fn a_line_is_a_type_and_how_it_is_reached() {
        for (line, expected, grants) in [
            (
                "type=virtio,device2, transport=mmio, grant_usage=1",
                2,
                true,
            ),
            ("transport=mmio,type=virtio,device1a", 0x1a, false),
            (
                "backend=0,grant_usage=0,transport=mmio,type=virtio,device2,",
                2,
                false,
            ),
            (
                ",,type=virtio,,device2,grant_usage=0,transport=unknown,transport=MMIO,grant_usage=0x1",
                2,
                true,
            ),
        ] {
            assert_eq!(device_type(line), Ok(expected), "{line}");
            let device = VirtioLine::parse(line).unwrap();
            assert_eq!(
                (device.grants(), device.is_mmio()),
                (grants, true),
                "{line}"
            );
        }
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (line, expected) in [
            ("", "has no transport=mmio"),
            ("type=virtio,device2", "has no transport=mmio"),
            ("transport=mmio", "has no type="),
            ("type=virtio,transport=mmio", "has no transport"),
            ("transport=mmio,type=virtio", "type=virtio ends the line"),
            (
                "type=virtio,devicex,transport=mmio",
                "type=virtio,devicex is not",
            ),
            (
                "type=virtio, device2,transport=mmio",
                "type=virtio, device2 is not",
            ),
            ("type=blk,transport=mmio", "type=blk is not virtio,device"),
            (
                "type=virtio,device2,transport=mmio,backend=driver",
                "backend=driver is not served",
            ),
            (
                "type=virtio,device2,transport=pci",
                "transport=pci is not served",
            ),
            (
                "type=virtio,device2,transport=mmio,grant_usage=yes",
                "xl takes grant_usage=yes for 0",
            ),
            (
                "type=virtio,device2,transport=mmio,grant_usage=1x",
                "xl takes grant_usage=1x for 1",
            ),
            (
                "type=virtio,device2,transprt=mmio",
                "xl knows no \"transprt=mmio\"",
            ),
            ("type=virtio,device2,transport=mmio, ", "xl knows no \" \""),
        ] {
            let error = device_type(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
