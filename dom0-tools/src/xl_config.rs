//! `xen-virtioctl check`: what is wrong with the virtio devices of an xl file, before `xl create` says
//! less about it.
//!
//! libxl refuses a disk that is a directory with "no suitable backend for disk xvda", and knows nothing of
//! what xen-virtiod will make of the rest.

mod disk;
mod syntax;
mod vdev;
mod virtio;

use crate::config::{CONFIG_PATH, Config};
use crate::state::Backing;
use crate::text::without_controls;
use disk::DiskLine;
use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::path::Path;
use syntax::Value;
use virtio::VirtioLine;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use xen_virtio_backend::blk::{Disk, SECTOR};

/// What was found in an xl file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Devices that xen-virtiod would serve as they are.
    pub good: Vec<String>,
    pub problems: Vec<String>,
}

impl Findings {
    fn take(&mut self, name: &str, result: Result<String, String>) {
        let about = |text| without_controls(format!("{name}: {text}").chars());
        match result {
            Ok(good) => self.good.push(about(good)),
            Err(problem) => self.problems.push(about(problem)),
        }
    }
}

/// Checks every virtio device in `text`, an xl file.
pub fn check(text: &str, config: &Config) -> Findings {
    let mut findings = Findings::default();
    if let Err(problem) = check_file(text, config, &mut findings) {
        findings.problems.push(without_controls(problem.chars()));
    } else if findings == Findings::default() {
        let problem = "no virtio device: no disk with specification=virtio, and no virtio = [ … ]";
        findings.problems.push(problem.to_owned());
    }
    findings
}

/// # Errors
///
/// What keeps xl from reading the file.
fn check_file(text: &str, config: &Config, findings: &mut Findings) -> Result<(), String> {
    let settings = syntax::parse(text)?;
    let mut disks = Disks::default();
    for line in list(&settings, "disk")? {
        match DiskLine::parse(line) {
            Err(problem) => findings.take(&format!("disk {line:?}"), Err(problem)),
            Ok(disk) if disk.is_virtio() => {
                let name = disk.get("vdev").map(str::to_owned);
                let name = name.unwrap_or_else(|| format!("{line:?}"));
                findings.take(&format!("disk {name}"), disks.check(&disk));
            }
            Ok(_) => {}
        }
    }
    let guest = match settings.get("name") {
        Some(Value::Single(name)) => Some(name.as_str()),
        _ => None,
    };
    for (index, line) in (0..).zip(list(&settings, "virtio")?) {
        let name = format!("virtio {index}");
        let result = VirtioLine::parse(line).and_then(|device| {
            let (path, disk) = configured_disk(&device, guest, index, config)?;
            disks.share(&name, path, &disk)?;
            Ok(describe(path, &disk, device.grants))
        });
        findings.take(&name, result);
    }
    Ok(())
}

fn list<'a>(settings: &'a HashMap<String, Value>, name: &str) -> Result<&'a [String], String> {
    match settings.get(name) {
        None => Ok(&[]),
        Some(Value::List(list)) => Ok(list),
        Some(Value::Single(text)) => Err(format!(
            "{name} = {text:?} is no list, and xl leaves it out: write {name} = [ {text:?} ]"
        )),
    }
}

/// The virtio disks so far.
#[derive(Default)]
struct Disks {
    numbers: BTreeSet<u32>,
    /// What they are in, their names, and whether the guest may write them.
    backings: Vec<(Backing, String, bool)>,
}

impl Disks {
    /// # Errors
    ///
    /// What keeps `disk` from being served, or should.
    fn check(&mut self, disk: &DiskLine<'_>) -> Result<String, String> {
        let path = disk.path()?;
        disk.check_standalone()?;
        let vdev = disk.get("vdev").ok_or("has no vdev=, like vdev=xvda")?;
        let number = vdev::number(vdev)
            .ok_or_else(|| format!("vdev={vdev} is no device that xl knows, like xvda"))?;
        if !self.numbers.insert(number) {
            return Err("is there twice".to_owned());
        }
        let path = Path::new(path);
        let opened = open(path, disk.is_read_only())?;
        self.share(vdev, path, &opened)?;
        let grants = disk.get("grant_usage") == Some("1");
        Ok(describe(path, &opened, grants))
    }

    /// Adds the disk `name`.
    ///
    /// # Errors
    ///
    /// If another one is in the same file, and one of them is written.
    fn share(&mut self, name: &str, path: &Path, disk: &Disk) -> Result<(), String> {
        let backing = Backing::of(disk.file()).map_err(|error| error.to_string())?;
        let writes = !disk.read_only();
        let shares = |(other, _, other_writes): &&(_, _, bool)| {
            *other == backing && (*other_writes || writes)
        };
        if let Some((_, other, _)) = self.backings.iter().find(shares) {
            return Err(format!(
                "{} is the disk {other} too: what is written to one of them is not known of the other",
                path.display()
            ));
        }
        self.backings.push((backing, name.to_owned(), writes));
        Ok(())
    }
}

/// The disk that the configuration has for a device, and its path.
fn configured_disk<'a>(
    device: &VirtioLine,
    guest: Option<&str>,
    index: u32,
    config: &'a Config,
) -> Result<(&'a Path, Disk), String> {
    if device.device_type != VIRTIO_ID_BLOCK {
        return Err(format!(
            "virtio,device{:x} is not served by this version",
            device.device_type
        ));
    }
    let guest = guest.ok_or("the file has no name = \"…\", which the configuration would go by")?;
    let configured = config.device(guest, index).ok_or_else(|| {
        format!("{CONFIG_PATH} has no [[virtio]] with guest = {guest:?} and index = {index}")
    })?;
    Ok((
        &configured.path,
        open(&configured.path, configured.read_only)?,
    ))
}

fn open(path: &Path, read_only: bool) -> Result<Disk, String> {
    Disk::open(path, read_only).map_err(|error| {
        let source = error.source().map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    })
}

/// What the guest would get.
fn describe(path: &Path, disk: &Disk, grants: bool) -> String {
    let how = if disk.read_only() {
        "read-only"
    } else {
        "read-write"
    };
    let memory = if grants {
        "granted pages only"
    } else {
        "ANY page of the guest: add grant_usage=1 unless that is meant"
    };
    let (path, bytes) = (path.display(), disk.bytes());
    let rest = disk.file().metadata().map_or(0, |file| file.len() % SECTOR);
    let rest = match rest {
        0 => String::new(),
        rest => format!(" (and {rest} more, which are no whole sector and stay unused)"),
    };
    format!("{path}, {bytes} bytes{rest}, {how}; touches {memory}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xl_would_misread_is_a_problem() {
        let disk = "specification=virtio, backendtype=standalone, vdev=xvda";
        for (lines, expected) in [
            (vec![], "no virtio device"),
            (vec!["phy:/dev/vg/a,xvda,w".to_owned()], "no virtio device"),
            (
                vec![format!("{disk}, specificaton=virtio, target=/x")],
                "xl knows no \"specificaton\"",
            ),
            (
                vec![format!("specification=virtio, target=/x, vdev=xvda")],
                "target= must come last; xl takes vdev=xvda for a part",
            ),
            (
                vec![format!("{disk}, format=qcow2, target=/x")],
                "disk xvda: format=qcow2 is not served: an image must be raw",
            ),
            (
                vec![format!("{disk}, transport=mmio, target=/x")],
                "xl knows no \"transport\"",
            ),
            (
                vec!["specification=virtio, backendtype=phy, vdev=xvda, target=/x".to_owned()],
                "backendtype=phy does not go",
            ),
            (
                vec!["specification=virtio, backendtype=standalone, target=/x".to_owned()],
                "has no vdev=",
            ),
            (
                vec!["specification=virtio, vdev=nonsense, target=/x".to_owned()],
                "vdev=nonsense is no device",
            ),
            (vec![format!("{disk}, target=x.img")], "no absolute path"),
            (
                vec![format!("{disk}, script=block-iscsi, target=/x")],
                "script=block-iscsi does not go",
            ),
            (vec![format!("{disk}, colo, target=/x")], "colo does not go"),
            (
                vec![format!("{disk}, backend=storage, target=/x")],
                "backend=storage is not served",
            ),
            (
                vec!["backendtype=standalone, vdev=xvda, target=/x".to_owned()],
                "disk xvda: has no specification=virtio",
            ),
            (
                vec![format!("target=/x, {disk}")],
                "target= must come last; xl takes specification=virtio for",
            ),
            (
                vec![
                    format!("{disk}, target=/x"),
                    "specification=virtio, vdev=51712, target=/y".to_owned(),
                ],
                "disk 51712: is there twice",
            ),
        ] {
            let text = format!(
                "name = 'a'\ndisk = [ {} ]",
                format!("{lines:?}").trim_matches(['[', ']'])
            );
            let problems = check(&text, &Config::default()).problems.join("\n");
            assert!(problems.contains(expected), "{text}: {problems}");
        }
    }

    fn check_one(disk: &str) -> Findings {
        let text = format!(
            "# a guest\nname = 'ivi'\nmemory=128\ndisk = [\n '{disk}', # first\n 'phy:/dev/vg/x,xvdb,w' ]\n"
        );
        check(&text, &Config::default())
    }

    #[test]
    fn a_good_disk_is_described() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let path = file.path().to_str().unwrap();
        let line = format!(
            "backendtype=standalone, specification=virtio, grant_usage=1, vdev=xvda, access=rw, target={path}"
        );
        let Findings { good, problems } = check_one(&line);
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(
            good,
            [format!(
                "disk xvda: {path}, 4096 bytes, read-write; touches granted pages only"
            )]
        );
    }

    #[test]
    fn a_problem_is_one_line_that_names_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        for (target, expected) in [
            (
                path,
                "is neither a regular file nor a block device",
            ),
            (
                "/no/such.img",
                "cannot be opened for reading and writing: No such file",
            ),
            ("/dev/null", "is neither a regular file nor a block device"),
        ] {
            let Findings { problems, .. } =
                check_one(&format!("specification=virtio,vdev=xvda,target={target}"));
            let [problem] = &problems[..] else {
                panic!("{problems:?}")
            };
            assert!(
                problem.contains(target) && problem.contains(expected) && !problem.contains('\n'),
                "{problem}"
            );
        }
        assert!(check_one("specification=virtio,vdev=xvda").problems[0].contains("target="));
    }

    #[test]
    fn disks_of_a_guest_share_no_file_that_one_of_them_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1000).unwrap();
        let path = file.path().display();
        let problems = |first: &str, second: &str| {
            let disk = |vdev, access| {
                format!("'specification=virtio, vdev={vdev}, access={access}, target={path}'")
            };
            let text = format!(
                "disk = [ {}, {} ]",
                disk("xvda", first),
                disk("xvdb", second)
            );
            check(&text, &Config::default())
        };
        let both = problems("r", "r");
        assert_eq!((both.good.len(), both.problems.len()), (2, 0));
        assert!(both.good[0].contains("512 bytes (and 488 more"), "{both:?}");
        for (first, second) in [("rw", "rw"), ("r", "rw"), ("rw", "r")] {
            let Findings { good, problems } = problems(first, second);
            assert_eq!((good.len(), problems.len()), (1, 1));
            assert!(problems[0].contains("is the disk xvda too"), "{problems:?}");
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_not_printed() {
        let vdev = "disk = [ 'specification=virtio, vdev=\u{1b}[2J, target=/x' ]";
        let bare = "disk = \u{1b}[2J";
        for text in [vdev, bare] {
            let problem = &check(text, &Config::default()).problems[0];
            assert!(!problem.contains(char::is_control), "{problem:?}");
            assert!(problem.contains("\u{fffd}"), "{problem:?}");
        }
    }

    #[test]
    fn other_disks_are_let_alone() {
        let findings = check_one("format=raw, vdev=xvda, access=rw, target=/x");
        assert!(
            findings.problems[0].starts_with("no virtio device"),
            "{findings:?}"
        );
    }

    #[test]
    fn the_other_form_needs_its_configuration() {
        let text = "name='ivi'\nvirtio = [ 'type=virtio,device2, transport=mmio', 'type=virtio,device22, transport=mmio' ]";
        let problems = check(text, &Config::default()).problems;
        assert!(
            problems[0].contains("guest = \"ivi\" and index = 0"),
            "{problems:?}"
        );
        assert!(
            problems[1].contains("virtio,device22 is not served"),
            "{problems:?}"
        );
    }

    #[test]
    fn a_device_of_the_other_form_is_described() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let path = file.path().to_str().unwrap();
        let config =
            format!("[[virtio]]\nguest = 'ivi'\nindex = 0\npath = {path:?}\nread-only = true");
        let config = Config::parse(CONFIG_PATH.as_ref(), &config).unwrap();
        let text = "name='ivi'\nvirtio = [ 'type=virtio,device2, transport=mmio' ]";
        let memory = "ANY page of the guest: add grant_usage=1 unless that is meant";
        assert_eq!(
            check(text, &config).good,
            [format!(
                "virtio 0: {path}, 512 bytes, read-only; touches {memory}"
            )]
        );
    }

    #[test]
    fn a_file_that_xl_cannot_read_has_one_problem() {
        for (text, expected) in [
            ("disk = [ 'specification=virtio", "line 1: "),
            (
                "disk = 'specification=virtio'",
                "disk = \"specification=virtio\" is no list",
            ),
        ] {
            let Findings { good, problems } = check(text, &Config::default());
            assert!(good.is_empty() && problems.len() == 1, "{problems:?}");
            assert!(problems[0].starts_with(expected), "{problems:?}");
        }
    }
}
