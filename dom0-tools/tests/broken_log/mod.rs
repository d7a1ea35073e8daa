//! A program whose standard error cannot be written to.

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

/// Runs `program`, which is to fail for its configuration, as it would with a standard error.
pub(crate) fn ends_as_with_a_log(program: &str, arguments: &[&str]) {
    for (what, stderr) in broken() {
        let status = Command::new(program)
            .args(arguments)
            .args(["--config", "/nonexistent/config.toml"])
            .env("XEN_VIRTIOD_LOG", "nonsense")
            .stderr(stderr)
            .status()
            .unwrap();
        // An error that it would have told of; a panic would be 101, or a signal.
        assert_eq!(status.code(), Some(1), "{program}: {what}");
    }
}
