//! What libxl and xen-virtiod want of a disk that xl has read.

use super::disk::{DiskLine, must_come_last};

impl DiskLine {
    /// Whether it is for xen-virtiod, or is meant to be: what says so may have become a part of the path.
    pub(super) fn is_virtio(&self) -> bool {
        self.specification() == Some("virtio")
            || self.backend_type() == Some("standalone")
            || self
                .swallowed()
                .any(|part| matches!(part, "specification=virtio" | "backendtype=standalone"))
    }

    /// What libxl does not do for a back-end of its own.
    ///
    /// # Errors
    ///
    /// The parameter, and what to write.
    pub(super) fn check_standalone(&self) -> Result<(), String> {
        if self.specification() != Some("virtio") {
            return Err("has no specification=virtio, without which it is a PV disk".to_owned());
        }
        if let Some(kind) = self.backend_type()
            && kind != "standalone"
        {
            return Err(format!(
                "backendtype={kind} does not go with specification=virtio: write backendtype=standalone"
            ));
        }
        if self.format() != "raw" {
            return Err(format!(
                "format={} is not served: an image must be raw",
                self.format()
            ));
        }
        if let Some(script) = self.script() {
            return Err(format!(
                "script={script} does not go with backendtype=standalone"
            ));
        }
        if self.has_colo() {
            return Err("colo does not go with backendtype=standalone".to_owned());
        }
        check_backend(self.backend().unwrap_or_default())
    }

    /// The path of its file or block device.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn path(&self) -> Result<&str, String> {
        if let Some(part) = self.swallowed().next() {
            return Err(must_come_last(part));
        }
        let target = self.target().unwrap_or_default();
        if target.is_empty() {
            return Err("has no target=, the path of its file or block device".to_owned());
        }
        if target.trim() != target {
            return Err(format!(
                "xl takes the spaces in target={target:?} for a part of the path"
            ));
        }
        if !target.starts_with('/') {
            return Err(format!(
                "target={target} is no absolute path, and xen-virtiod has another working directory: write the \
                 whole path, from its first /"
            ));
        }
        Ok(target)
    }
}

/// # Errors
///
/// For devices of another domain than dom0, which xen-virtiod there would serve.
pub(super) fn check_backend(domain: &str) -> Result<(), String> {
    // libxl takes digits for a number, and no digits for 0.
    if domain == "Domain-0" || domain.chars().all(|c| c == '0') {
        return Ok(());
    }
    Err(format!(
        "backend={domain} is not served: xen-virtiod serves from dom0"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_whole_and_last() {
        for (target, expected) in [
            ("", "has no target="),
            (" /x", "takes the spaces"),
            ("/x ", "takes the spaces"),
            ("x.img", "target=x.img is no absolute path"),
            ("/x, access=r", "must come last; xl takes access=r for"),
        ] {
            let line = format!("vdev=xvda,target={target}");
            let disk = DiskLine::parse(&line).unwrap();
            let error = disk.path().unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
        let disk = DiskLine::parse("vdev=xvda,target=/a, b").unwrap();
        assert_eq!(disk.path(), Ok("/a, b"));
    }

    #[test]
    fn a_disk_is_meant_for_us_also_where_its_path_says_so() {
        for (line, expected) in [
            ("specification=virtio,vdev=xvda,target=/x", true),
            ("backendtype=standalone,vdev=xvda,target=/x", true),
            ("vdev=xvda,target=/x, access=rw, specification=virtio", true),
            ("vdev=xvda,target=/x, access=rw", false),
            ("/x,raw,xvda,w", false),
        ] {
            let disk = DiskLine::parse(line).unwrap();
            assert_eq!(disk.is_virtio(), expected, "{line}");
        }
    }

    #[test]
    fn dom0_has_several_names() {
        for domain in ["", "0", "00", "Domain-0"] {
            assert_eq!(check_backend(domain), Ok(()), "{domain}");
        }
        for domain in ["1", "10", "driver", "domain-0"] {
            assert!(check_backend(domain).is_err(), "{domain}");
        }
    }
}
