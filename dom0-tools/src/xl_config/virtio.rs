//! What xl makes of one device of `virtio = [ … ]` (xl.cfg(5)).

use super::disk::check_backend;

/// A device's parameters.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct VirtioLine {
    /// A number in hexadecimal in the xl file (virtio 1.3, section 5).
    pub(super) device_type: u32,
    pub(super) grants: bool,
}

impl VirtioLine {
    /// # Errors
    ///
    /// What xl would refuse, or xen-virtiod cannot serve.
    pub(super) fn parse(line: &str) -> Result<Self, String> {
        let (mut device_type, mut transport, mut grants) = (None, None, false);
        let mut parts = line.split(',').map(str::trim_start);
        while let Some(part) = parts.next() {
            match part.split_once('=') {
                // The type has a comma in it: `type=virtio,device2`.
                Some(("type", "virtio")) => device_type = parts.next().and_then(parse_type),
                Some(("type", value)) => return Err(format!("type={value} is not virtio,device…")),
                Some(("transport", value)) => transport = Some(value),
                Some(("grant_usage", "1")) => grants = true,
                Some(("grant_usage", "0")) => {}
                Some(("backend", domain)) => check_backend(domain)?,
                Some(("grant_usage", value)) => {
                    return Err(format!("grant_usage={value} is none of 0, 1"));
                }
                _ if part.is_empty() => {}
                _ => return Err(format!("xl knows no {part:?}")),
            }
        }
        match transport {
            Some("mmio") => {}
            Some(other) => return Err(format!("transport={other} is not served, only mmio is")),
            None => return Err("has no transport=mmio".to_owned()),
        }
        let device_type = device_type.ok_or(
            "has no type=virtio,device and a number in hexadecimal, like type=virtio,device2",
        )?;
        Ok(Self {
            device_type,
            grants,
        })
    }
}

fn parse_type(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("device")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_type_and_how_it_is_reached() {
        for (line, device_type, grants) in [
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
        ] {
            let expected = VirtioLine {
                device_type,
                grants,
            };
            assert_eq!(VirtioLine::parse(line), Ok(expected), "{line}");
        }
        for (line, expected) in [
            ("", "has no transport=mmio"),
            ("type=virtio,device2", "has no transport=mmio"),
            ("transport=mmio", "has no type="),
            ("type=virtio,transport=mmio", "has no transport"),
            ("type=virtio,devicex,transport=mmio", "has no type="),
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
                "grant_usage=yes",
            ),
            (
                "type=virtio,device2,transprt=mmio",
                "xl knows no \"transprt=mmio\"",
            ),
        ] {
            let error = VirtioLine::parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
