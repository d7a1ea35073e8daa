//! `xen-virtioctl check` reads xl files as xl does: against xl's own libxlutil, Debian's `libxen-dev`.
//!
//! What xen-virtiod refuses of what xl takes is no difference: what was read is compared, not what is made
//! of it.

#[path = "xl_verdicts/corpus.rs"]
mod corpus;
#[path = "xl_verdicts/generated.rs"]
mod generated;
#[path = "xl_verdicts/library.rs"]
// Calls libxlutil.
#[allow(unsafe_code)]
mod library;

use generated::Random;
use library::Library;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::fmt::Debug;
use xen_virtio_dom0_tools::ctl::xl_config::{DiskLine, Value, parse_file};

/// Of what is generated. Another one gives other files and lines.
const SEED: u64 = 0x78_6c;

/// Files and lines that are generated.
const GENERATED: usize = 3000;

/// The settings that the files have.
const NAMES: &[&str] = &[
    "a", "a.b", "a_1", "b", "disk", "extra", "memory", "name", "virtio",
];

/// The first Xen whose library reads `grant_usage=`, `trusted` and `untrusted` in a disk.
const FIRST_WITH_GRANTS: u32 = 19;

/// What a line says of a disk, as far as it matters to us.
#[derive(Debug, PartialEq, Eq)]
struct Reading {
    target: Option<String>,
    vdev: Option<String>,
    format: Option<String>,
    backend_type: Option<String>,
    specification: Option<String>,
    script: Option<String>,
    backend: Option<String>,
    writable: bool,
    cdrom: bool,
    colo: bool,
    grants: Option<bool>,
}

impl Reading {
    fn ours(line: &str) -> Option<Self> {
        let disk = DiskLine::parse(line).ok()?;
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Self {
            target: owned(disk.target()),
            vdev: owned(Some(disk.vdev())),
            format: owned(Some(disk.format())),
            backend_type: owned(disk.backend_type()),
            specification: owned(disk.specification()),
            script: owned(disk.script()),
            backend: owned(disk.backend()),
            writable: disk.is_writable(),
            cdrom: disk.is_cdrom(),
            colo: disk.has_colo(),
            grants: disk.grants(),
        })
    }

    /// libxl leaves out what has its default.
    fn theirs(json: &Json) -> Self {
        let text = |name: &str| json[name].as_str().map(str::to_owned);
        let is_set = |name: &str| json[name].as_i64().is_some_and(|number| number != 0);
        let chosen = |name: &str| match json[name].as_str() {
            Some("True") => Some(true),
            Some("False") => Some(false),
            _ => None,
        };
        Self {
            target: text("pdev_path"),
            vdev: text("vdev"),
            format: text("format"),
            backend_type: text("backend"),
            specification: text("specification"),
            script: text("script"),
            backend: text("backend_domname"),
            writable: is_set("readwrite"),
            cdrom: is_set("is_cdrom"),
            colo: chosen("colo_enable") == Some(true),
            grants: chosen("grant_usage"),
        }
    }
}

/// What was compared, and what differed.
#[derive(Default)]
struct Comparison {
    accepted: usize,
    refused: usize,
    differences: Vec<String>,
}

impl Comparison {
    fn add<T: Debug + PartialEq>(&mut self, input: &str, ours: Option<T>, theirs: Option<T>) {
        if theirs.is_some() {
            self.accepted += 1;
        } else {
            self.refused += 1;
        }
        if ours != theirs {
            self.differences
                .push(format!("{input}\n  ours:   {ours:?}\n  theirs: {theirs:?}"));
        }
    }

    fn judge(&self, minor: u32) {
        let (accepted, refused) = (self.accepted, self.refused);
        println!("Xen 4.{minor}, seed {SEED:#x}: {accepted} accepted, {refused} refused");
        let count = self.differences.len();
        let shown = &self.differences[..count.min(20)];
        assert!(
            shown.is_empty(),
            "Xen 4.{minor}, seed {SEED:#x}: {count} differences\n{}",
            shown.join("\n")
        );
        // A comparison of nothing but refusals would say little.
        assert!(
            accepted > 300 && refused > 300,
            "{accepted} accepted, {refused} refused"
        );
    }
}

#[test]
fn a_file_is_read_as_libxlutil_reads_it() {
    let library = Library::load();
    let mut random = Random::new(SEED);
    let generated = (0..GENERATED).map(|_| generated::file(&mut random).into_bytes());
    let files = corpus::FILES.iter().map(|file| file.to_vec());
    let mut comparison = Comparison::default();
    for file in files.chain(generated) {
        let ours = parse_file(&file).ok().map(|settings| {
            let named = |name: &&str| Some(((*name).to_owned(), settings.get(name)?.clone()));
            NAMES
                .iter()
                .filter_map(named)
                .collect::<BTreeMap<String, Value>>()
        });
        let theirs = library.settings(&file, NAMES);
        comparison.add(
            &format!("{:?}", String::from_utf8_lossy(&file)),
            ours,
            theirs,
        );
    }
    comparison.judge(library.minor);
}

#[test]
fn a_disk_is_read_as_libxlutil_reads_it() {
    let library = Library::load();
    let mut random = Random::new(SEED);
    let generated = (0..GENERATED).map(|_| generated::line(&mut random));
    let lines = corpus::LINES.iter().map(|line| (*line).to_owned());
    let is_known = |line: &String| {
        library.minor >= FIRST_WITH_GRANTS
            || !line.contains("grant_usage") && !line.contains("trusted")
    };
    let mut comparison = Comparison::default();
    for line in lines.chain(generated).filter(is_known) {
        // A stray equals sign before a line feed ends the library's process, and xl with it.
        if line.contains("=\n") {
            continue;
        }
        let theirs = library.disk(&line).map(|json| Reading::theirs(&json));
        comparison.add(&format!("{line:?}"), Reading::ours(&line), theirs);
    }
    comparison.judge(library.minor);
}

#[test]
fn the_corpus_is_large_and_says_nothing_twice() {
    let mut files = corpus::FILES.to_vec();
    let mut lines = corpus::LINES.to_vec();
    let count = files.len() + lines.len();
    assert!(count >= 200, "{count}");
    files.sort_unstable();
    files.dedup();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(files.len() + lines.len(), count);
}
