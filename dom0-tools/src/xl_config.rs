//! `xen-virtioctl check`: what is wrong with the virtio devices of an xl file, before `xl create` says
//! less about it.
//!
//! libxl refuses a disk that is a directory with "no suitable backend for disk xvda", and knows nothing of
//! what xen-virtiod will make of the rest.

use crate::config::Config;
use std::collections::BTreeSet;
use std::path::Path;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use xen_virtio_backend::blk::Disk;

/// What was found in an xl file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Devices that xen-virtiod would serve as they are.
    pub good: Vec<String>,
    pub problems: Vec<String>,
}

/// Checks every virtio device in `text`, an xl file.
pub fn check(text: &str, config: &Config) -> Findings {
    let settings = parse(text);
    let list = |key: &str| {
        settings
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, values)| values.as_slice())
            .unwrap_or_default()
    };
    let mut findings = Findings::default();
    let mut vdevs = BTreeSet::new();
    for line in list("disk") {
        if let Some(problem) = misspelt(line) {
            findings.problems.push(problem);
        } else if let Some(result) = check_disk(line) {
            findings.take(result);
            let vdev = field(line, "vdev").unwrap_or("?");
            if !vdevs.insert(vdev) {
                findings
                    .problems
                    .push(format!("disk {vdev}: is there twice"));
            }
        }
    }
    let guest = list("name").first().cloned().unwrap_or_default();
    for (index, line) in (0..).zip(list("virtio")) {
        findings.take(check_virtio(line, &guest, index, config));
    }
    if findings == Findings::default() {
        let problem = "no virtio device: no disk with specification=virtio, and no virtio = [ … ]";
        findings.problems.push(problem.to_owned());
    }
    findings
}

/// What xl knows in a disk's line (xl-disk-configuration(5)).
const DISK_KEYS: [&str; 15] = [
    "access",
    "backend",
    "backendtype",
    "cdrom",
    "devtype",
    "direct-io-safe",
    "discard",
    "format",
    "grant_usage",
    "no-discard",
    "script",
    "specification",
    "target",
    "transport",
    "vdev",
];

/// A key that xl does not know, or one that xl takes for a part of the path.
fn misspelt(line: &str) -> Option<String> {
    let unknown = |(key, _): &&(&str, &str)| !DISK_KEYS.contains(key) && !key.starts_with("colo");
    if let Some((key, _)) = fields(line).iter().find(unknown) {
        return Some(format!("disk {line:?}: xl knows no {key:?}"));
    }
    let target = field(line, "target")?;
    let behind = target.split(',').skip(1).map(str::trim_start);
    let swallowed = behind
        .filter_map(|part| part.split_once('='))
        .find(|(key, _)| DISK_KEYS.contains(key))?;
    Some(format!(
        "disk {line:?}: target= must come last; xl takes {}= for a part of the path",
        swallowed.0
    ))
}

/// The value of one key of a device line.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let mut fields = fields(line).into_iter();
    fields
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value)
}

impl Findings {
    fn take(&mut self, result: Result<String, String>) {
        match result {
            Ok(good) => self.good.push(good),
            Err(problem) => self.problems.push(problem),
        }
    }
}

/// `None` for a disk that is not xen-virtiod's.
fn check_disk(line: &str) -> Option<Result<String, String>> {
    let field = |key: &str| field(line, key);
    if field("specification") != Some("virtio") {
        return None;
    }
    let vdev = field("vdev").unwrap_or("?");
    let check = || {
        if field("backendtype").is_some_and(|kind| kind != "standalone") {
            return Err(format!(
                "disk {vdev}: specification=virtio goes with backendtype=standalone"
            ));
        }
        if field("vdev").is_none() {
            return Err(format!("disk {line:?}: has no vdev=, like vdev=xvda"));
        }
        if let Some(format) = field("format").filter(|format| *format != "raw") {
            return Err(format!(
                "disk {vdev}: format={format} is not served: an image must be raw"
            ));
        }
        if let Some(transport) = field("transport").filter(|transport| *transport != "mmio") {
            return Err(format!(
                "disk {vdev}: transport={transport} is not served, only mmio is"
            ));
        }
        let Some(target) = field("target") else {
            return Err(format!(
                "disk {vdev}: has no target=, the path of its file or block device"
            ));
        };
        let read_only = matches!(field("access"), Some("r" | "ro"));
        let disk = Disk::open(Path::new(target), read_only).map_err(|error| one_line(&error))?;
        let how = if read_only { "read-only" } else { "read-write" };
        let memory = match field("grant_usage") {
            Some("1") => "granted pages only",
            _ => "ANY page of the guest: add grant_usage=1 unless that is meant",
        };
        Ok(format!(
            "disk {vdev}: {target}, {} bytes, {how}; touches {memory}",
            disk.bytes()
        ))
    };
    Some(check())
}

fn check_virtio(line: &str, guest: &str, index: u32, config: &Config) -> Result<String, String> {
    let kind = fields(line)
        .into_iter()
        .find(|(name, _)| *name == "type")
        .map_or("", |(_, value)| value);
    // A type has a comma in it: `virtio,device2`.
    let digits = line.split("virtio,device").nth(1).unwrap_or("");
    let end = digits
        .find(|c: char| !c.is_ascii_hexdigit())
        .unwrap_or(digits.len());
    if let Some(transport) = field(line, "transport").filter(|transport| *transport != "mmio") {
        return Err(format!(
            "virtio {index}: transport={transport} is not served, only mmio is"
        ));
    }
    let device_type = u32::from_str_radix(&digits[..end], 16)
        .map_err(|_| format!("virtio {index}: type {kind:?} is not virtio,device and a number"))?;
    if device_type != VIRTIO_ID_BLOCK {
        return Err(format!(
            "virtio {index}: virtio,device{device_type:x} is not served by this version"
        ));
    }
    let device = config.device(guest, index).ok_or_else(|| {
        format!(
            "virtio {index}: {} has no [[virtio]] with guest = {guest:?} and index = {index}",
            crate::config::CONFIG_PATH
        )
    })?;
    Disk::open(&device.path, device.read_only).map_err(|error| one_line(&error))?;
    Ok(format!("virtio {index}: {}", device.path.display()))
}

fn one_line(error: &dyn std::error::Error) -> String {
    let source = error
        .source()
        .map(|source| format!(": {source}"))
        .unwrap_or_default();
    format!("{error}{source}")
}

/// The `key=value` parts of a device line; `target=` takes all that follows it.
fn fields(line: &str) -> Vec<(&str, &str)> {
    let mut fields = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let (part, after) = match rest.strip_prefix("target=") {
            Some(target) => {
                fields.push(("target", target));
                break;
            }
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        if let Some((key, value)) = part.split_once('=') {
            fields.push((key.trim(), value.trim()));
        }
        rest = after.trim_start();
    }
    fields
}

/// The settings of an xl file, in order: a name, and the strings or numbers that it is set to.
fn parse(text: &str) -> Vec<(String, Vec<String>)> {
    let mut settings: Vec<(String, Vec<String>)> = Vec::new();
    let mut words = Words { rest: text };
    let mut last = None;
    let mut depth = 0usize;
    while let Some(word) = words.next() {
        match word {
            Word::Mark('=') if depth == 0 => {
                settings.push((last.take().unwrap_or_default(), Vec::new()));
            }
            Word::Mark('[') => depth += 1,
            Word::Mark(']') => depth = depth.saturating_sub(1),
            Word::Mark(_) => {}
            Word::Text(text) => {
                // A name, if `=` follows; else a value of the setting that has begun.
                if depth == 0 && words.rest.trim_start().starts_with(['=', '+']) {
                    last = Some(text);
                } else if let Some((_, values)) = settings.last_mut() {
                    values.push(text);
                }
            }
        }
    }
    settings
}

enum Word {
    Text(String),
    Mark(char),
}

struct Words<'a> {
    rest: &'a str,
}

impl Iterator for Words<'_> {
    type Item = Word;

    fn next(&mut self) -> Option<Word> {
        loop {
            self.rest = self.rest.trim_start();
            match self.rest.chars().next()? {
                '#' => self.rest = self.rest.split_once('\n').map_or("", |(_, after)| after),
                quote @ ('\'' | '"') => {
                    let inside = &self.rest[1..];
                    let (text, after) = inside.split_once(quote).unwrap_or((inside, ""));
                    self.rest = after;
                    return Some(Word::Text(text.to_owned()));
                }
                mark @ ('=' | '[' | ']' | ',' | ';' | '+') => {
                    self.rest = &self.rest[1..];
                    return Some(Word::Mark(mark));
                }
                _ => {
                    let end = |c: char| c.is_whitespace() || "#'\"=[],;+".contains(c);
                    let len = self.rest.find(end).unwrap_or(self.rest.len());
                    let (text, after) = self.rest.split_at(len);
                    self.rest = after;
                    return Some(Word::Text(text.to_owned()));
                }
            }
        }
    }
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
                "specificaton",
            ),
            (
                vec![format!("target=/x, {disk}")],
                "target= must come last; xl takes specification=",
            ),
            (
                vec![format!("{disk}, format=qcow2, target=/x")],
                "must be raw",
            ),
            (
                vec![format!("{disk}, transport=pci, target=/x")],
                "transport=pci",
            ),
            (
                vec!["specification=virtio, backendtype=standalone, target=/x".to_owned()],
                "has no vdev=",
            ),
            (
                vec![format!("{disk}, target=/x"), format!("{disk}, target=/y")],
                "disk xvda: is there twice",
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
                "cannot be opened for reading and writing: Is a directory",
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
    fn other_disks_and_any_text_are_let_alone() {
        let findings = check_one("format=raw, vdev=xvda, access=rw, target=/x");
        assert!(
            findings.problems[0].starts_with("no virtio device"),
            "{findings:?}"
        );
        for text in [
            "",
            "disk",
            "disk = [",
            "disk = [ 'a",
            "= = ]]",
            "disk += [ \"x\" ]",
            "#",
        ] {
            check(text, &Config::default());
        }
    }

    #[test]
    fn the_other_form_needs_its_configuration() {
        let text = "name=\"ivi\"\nvirtio = [ \"type=virtio,device2, transport=mmio\", \"type=virtio,device22\" ]";
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
}
