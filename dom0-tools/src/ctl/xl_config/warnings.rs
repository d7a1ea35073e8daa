//! What xl and xen-virtiod take, and what still keeps a guest from its disk.

use super::syntax::Settings;
use super::vdev;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use xen_virtio_backend::blk::Disk;

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The unit of `st_blocks` (stat(2)).
const STAT_BLOCK: u64 = 512;

/// A disk of the guest's, as the file lists it.
pub(super) struct ListedDisk {
    /// The number of its vdev.
    pub(super) number: Option<u32>,
    pub(super) is_virtio: bool,
}

/// The first xl that has words for virtio devices and what they grant.
const FIRST_XL: (u32, u32) = (4, 19);

/// Of an xl that is as old as the Xen of this version.
pub(crate) fn of_xl(xen: (u32, u32)) -> Option<String> {
    let (major, minor) = xen;
    (xen < FIRST_XL).then(|| {
        format!(
            "the xl of Xen {major}.{minor} has no virtio = [ … ] (4.18), nor grant_usage (4.19): describe the devices in \
             /etc/xen-virtiod/guests/NAME.toml"
        )
    })
}

/// Of a byte that xl leaves out.
pub(super) fn of_last_byte(settings: &Settings) -> Option<String> {
    let (line, byte) = settings.left_out()?;
    // An empty comment, or a line end of another system, means nothing.
    let is_harmless = matches!(byte, b'#' | b'\r');
    (!is_harmless).then(|| {
        format!(
            "line {line}: xl leaves out the last byte of the file, {}: remove it",
            char::from(byte)
        )
    })
}

/// Of what is in the image at `path`, and of how it is stored.
pub(super) fn of_image(path: &Path, disk: &Disk) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut magic = [0; QCOW2_MAGIC.len()];
    // Opened once more: the disk itself takes whole sectors only.
    let was_read = File::open(path).and_then(|file| file.read_exact_at(&mut magic, 0));
    let path = path.display();
    if was_read.is_ok() && magic == QCOW2_MAGIC {
        warnings.push(format!(
            "{path} begins like a qcow2 image, and is served as it is: convert it by qemu-img convert -O raw"
        ));
    }
    if let Ok(status) = disk.file().metadata()
        && status.is_file()
        && !disk.read_only()
    {
        let (allocated, bytes) = (status.blocks().saturating_mul(STAT_BLOCK), status.len());
        if allocated < bytes {
            warnings.push(format!(
                "{path} has {allocated} of {bytes} bytes allocated; the guest waits once dom0's file system is \
                 full: reserve the rest by fallocate -l {bytes} {path}"
            ));
        }
    }
    warnings
}

/// Of a root file system on what was a PV disk.
pub(super) fn of_root(settings: &Settings, disks: &[ListedDisk]) -> Option<String> {
    if !disks.iter().any(|disk| disk.is_virtio) {
        return None;
    }
    let command_line = command_line(settings);
    let mut words = command_line.split_whitespace();
    // The last one counts.
    let root = words.rfind(|word| word.starts_with("root="))?;
    let name = root.strip_prefix("root=/dev/")?;
    if !name.starts_with("xvd") {
        return None;
    }
    let whole = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let partition = &name[whole.len()..];
    for (name, partition) in [(name, ""), (whole, partition)] {
        let is_named =
            |disk: &&ListedDisk| disk.number.is_some() && disk.number == vdev::number(name);
        let Some(disk) = disks.iter().find(is_named) else {
            continue;
        };
        if !disk.is_virtio {
            return None;
        }
        let mut virtio_disks = disks.iter().filter(|disk| disk.is_virtio);
        let index = virtio_disks.position(|disk| is_named(&disk))?;
        let letter = ('a'..='z').nth(index)?;
        return Some(format!(
            "{root}: the virtio disk {name} is /dev/vd{letter} in the guest: write root=/dev/vd{letter}{partition}"
        ));
    }
    Some(format!(
        "{root} is no disk of the guest's: its virtio disks are /dev/vda, /dev/vdb and so on, in the order of \
         the file"
    ))
}

/// The kernel's command line, as xl puts it together.
fn command_line(settings: &Settings) -> String {
    if let Some(command_line) = settings.text("cmdline") {
        return command_line.to_owned();
    }
    let root = settings.text("root").map(|root| format!("root={root} "));
    root.unwrap_or_default() + settings.text("extra").unwrap_or_default()
}

/// Of a boot loader whose disks have grant_usage=1.
pub(super) fn of_boot_loader(settings: &Settings) -> Option<String> {
    let loader = if let Some(firmware) = settings.text("firmware") {
        format!("firmware={firmware}")
    } else {
        let kernel = settings.text("kernel")?;
        let file_name = kernel.rsplit('/').next()?.to_ascii_lowercase();
        if !file_name.starts_with("u-boot") && !file_name.starts_with("uboot") {
            return None;
        }
        format!("kernel={kernel}")
    };
    Some(format!(
        "{loader}: a boot loader like U-Boot grants no pages, and reads no disk with grant_usage=1: write \
         grant_usage=0"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::syntax;
    use super::*;
    use std::io::Write;
    use tempfile::NamedTempFile;

    #[test]
    fn a_byte_that_somebody_meant_is_named() {
        let warning = |text: &str| of_last_byte(&syntax::parse(text.as_bytes()).unwrap());
        let unit = warning("a = 1\nmemory = 128M").unwrap();
        assert!(
            unit.contains("line 2: xl leaves out the last byte of the file, M"),
            "{unit}"
        );
        for text in ["a = 1", "a = 1\n#", "a = 1\r"] {
            assert_eq!(warning(text), None, "{text:?}");
        }
    }

    #[test]
    fn an_image_is_read_for_its_format_and_its_holes() {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        file.as_file().sync_all().unwrap();
        let warnings = |read_only| {
            let disk = Disk::open(file.path(), read_only).unwrap();
            of_image(file.path(), &disk)
        };
        assert_eq!(warnings(false), Vec::<String>::new());
        file.as_file().set_len(1 << 20).unwrap();
        let found = warnings(false);
        let [sparse] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(
            sparse.contains("of 1048576 bytes allocated")
                && sparse.contains("fallocate -l 1048576"),
            "{sparse}"
        );
        assert_eq!(warnings(true), Vec::<String>::new());
        file.as_file().write_all_at(b"QFI\xfb", 0).unwrap();
        let found = warnings(true);
        let [qcow2] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(qcow2.contains("qemu-img convert -O raw"), "{qcow2}");
    }

    #[test]
    fn a_root_of_pv_is_translated() {
        let disks = [(51712, true), (51728, false), (51744, true)];
        let disks = disks.map(|(number, is_virtio)| ListedDisk {
            number: Some(number),
            is_virtio,
        });
        let warning = |text: &str| of_root(&syntax::parse(text.as_bytes()).unwrap(), &disks);
        for (text, expected) in [
            (
                "extra = 'ro root=/dev/xvda rw'",
                "xvda is /dev/vda in the guest: write root=/dev/vda",
            ),
            ("root = '/dev/xvdc2'", "write root=/dev/vdb2"),
            (
                "cmdline = 'root=/dev/vda root=/dev/xvda1'\nextra = 'root=/dev/vda'",
                "write root=/dev/vda1",
            ),
            (
                "extra = 'root=/dev/xvdd'",
                "root=/dev/xvdd is no disk of the guest's",
            ),
        ] {
            let warning = warning(text).unwrap();
            assert!(warning.contains(expected), "{text}: {warning}");
        }
        for text in [
            "",
            "extra = 'root=/dev/vda'",
            "extra = 'root=/dev/xvdb1'",
            "root = '/dev/xvda'\nextra = 'root=/dev/vda'",
            "cmdline = 'quiet'\nroot = '/dev/xvda'",
            "extra = [ 'root=/dev/xvda' ]",
        ] {
            assert_eq!(warning(text), None, "{text}");
        }
        let settings = syntax::parse(b"root = '/dev/xvda'").unwrap();
        assert_eq!(of_root(&settings, &disks[1..2]), None);
    }

    #[test]
    fn a_boot_loader_is_known_by_its_name() {
        for (text, expected) in [
            ("kernel = '/boot/u-boot.bin'", true),
            ("kernel = 'U-Boot-xen.elf'", true),
            ("firmware = 'uefi'", true),
            ("kernel = '/u-boot/Image'", false),
            ("", false),
        ] {
            let settings = syntax::parse(text.as_bytes()).unwrap();
            assert_eq!(of_boot_loader(&settings).is_some(), expected, "{text}");
        }
    }
}
