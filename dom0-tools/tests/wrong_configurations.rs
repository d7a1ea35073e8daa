//! What is wrong with a configuration is said in words that somebody can act on: the whole message of each is in
//! `wrong_configurations.txt`. With `RECORD=1` in the environment they are written there, for somebody to read.

use std::error::Error;
use std::fs;
use std::path::Path;
use xen_virtio_backend::with_sources;
use xen_virtio_dom0_tools::config::Config;
use xen_virtio_dom0_tools::ctl::check;
use xen_virtio_dom0_tools::ctl::xl_config::{self, Findings};
use xen_virtio_dom0_tools::toolstack::guest_file::GuestFiles;

const GOLDEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/wrong_configurations.txt"
);

/// Before the message about what stands above it.
const SAID: &str = "->\n";

fn problems(findings: Findings) -> String {
    findings.problems.join("\n")
}

/// What is said of `text`, which is a file of this kind.
fn said(kind: &str, text: &str) -> String {
    match kind {
        "config.toml" => match Config::parse(Path::new("/etc/xen-virtiod/config.toml"), text) {
            Ok(_) => String::new(),
            Err(error) => with_sources(&error),
        },
        "guests/g.toml" => {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("g.toml"), text).unwrap();
            let found = match check::guest_file(&GuestFiles::new(folder.path()), "g") {
                Ok(findings) => problems(findings),
                Err(error) => with_sources(&error as &dyn Error),
            };
            let place = folder.path().display().to_string();
            found.replace(&place, "/etc/xen-virtiod/guests")
        }
        "guest.cfg" => problems(xl_config::check(text.as_bytes(), &Config::default())),
        other => panic!("{other} is no kind of file"),
    }
}

#[test]
fn each_wrong_configuration_has_its_message() {
    let golden = fs::read_to_string(GOLDEN).unwrap();
    let mut now = String::new();
    let mut count = 0;
    for block in golden.split("### ").skip(1) {
        let (kind, rest) = block.split_once('\n').unwrap();
        let (text, _) = rest.split_once(SAID).unwrap();
        let message = said(kind, text);
        assert!(!message.is_empty(), "nothing is wrong with {text}");
        now += &format!("### {kind}\n{text}{SAID}{}\n\n", message.trim_end());
        count += 1;
    }
    assert!(count >= 30, "{count}");
    if std::env::var_os("RECORD").is_some() {
        fs::write(GOLDEN, &now).unwrap();
    }
    assert_eq!(now, golden, "RECORD=1 writes what is said now");
}
