//! A program whose log cannot be written does its work all the same.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

/// What standard error can come to: a full disk, a pipe and a journal that nobody reads any more.
fn broken() -> [(&'static str, Stdio); 3] {
    let (_, pipe) = io::pipe().unwrap();
    let (journal, _) = UnixStream::pair().unwrap();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    [
        ("a full disk", full.into()),
        ("a dead pipe", pipe.into()),
        ("a dead journal", OwnedFd::from(journal).into()),
    ]
}

#[test]
fn programs_end_as_they_would_with_a_log() {
    for program in [
        env!("CARGO_BIN_EXE_xen-virtiod"),
        env!("CARGO_BIN_EXE_xen-virtioctl"),
    ] {
        for (what, stderr) in broken() {
            let mut command = Command::new(program);
            if program.ends_with("ctl") {
                command.arg("check");
            }
            let status = command
                .args(["--config", "/nonexistent/config.toml"])
                .env("XEN_VIRTIOD_LOG", "nonsense")
                .stderr(stderr)
                .status()
                .unwrap();
            // An error that it would have told of; a panic would be 101, or a signal.
            assert_eq!(status.code(), Some(1), "{program}: {what}");
        }
    }
}
