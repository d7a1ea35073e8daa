//! The process that keeps a back-end's program running. Only root can give that another user.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const USER: u32 = 4711;
const LIMIT: Duration = Duration::from_secs(10);

struct Keeper {
    process: Child,
    lines: Receiver<String>,
}

impl Keeper {
    fn start(lock: &Path, socket: &Path, script: &str) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_xen-virtiod"))
            .arg("back-end")
            .arg(lock)
            .args([
                "--label",
                "guest g (7): virtio_file/0",
                "--user",
                &USER.to_string(),
                "--socket",
            ])
            .arg(socket)
            .args(["--", "/bin/sh", "-c", script])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let log = BufReader::new(process.stderr.take().unwrap());
        std::thread::spawn(move || {
            log.lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self { process, lines }
    }

    /// The next line that has `text`.
    fn says(&self, text: &str) -> String {
        let began = Instant::now();
        loop {
            let line = self
                .lines
                .recv_timeout(LIMIT)
                .unwrap_or_else(|_| panic!("it does not say {text:?}"));
            if line.contains(text) {
                return line;
            }
            assert!(began.elapsed() < LIMIT, "it does not say {text:?}");
        }
    }

    fn end(mut self) {
        let pid = Pid::from_raw(self.process.id().try_into().unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

/// A lock, and a socket in a folder that is not there.
fn places(name: &str) -> (PathBuf, PathBuf) {
    let dir = std::env::temp_dir().join(format!("keeper-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let lock = dir.join("7-uuid-virtio_file-0");
    File::create(&lock).unwrap();
    (lock, dir.join("sockets/g.sock"))
}

fn lives(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[test]
fn a_program_runs_as_its_user_and_is_started_again() {
    if !geteuid().is_root() {
        return;
    }
    let (lock, socket) = places("again");
    let script = "echo as $(id -u) $(id -G), $(grep NoNewPrivs /proc/self/status) $(cat /proc/self/oom_score_adj); exit 3";
    let keeper = Keeper::start(&lock, &socket, script);
    let first = keeper.says("as ");
    assert!(
        first.contains("guest g (7): virtio_file/0: as 4711 4711, NoNewPrivs: 1 500"),
        "{first}"
    );
    keeper.says("/bin/sh has ended (exit status: 3); it is started again in 100 ms");
    keeper.says("as 4711");
    keeper.says("it is started again in 200 ms");
    let folder = socket.parent().unwrap().metadata().unwrap();
    assert_eq!(
        (folder.uid(), folder.gid(), folder.mode() & 0o7777),
        (USER, USER, 0o700)
    );
    keeper.end();
}

#[test]
fn a_keeper_takes_its_program_with_it_and_is_the_only_one() {
    if !geteuid().is_root() {
        return;
    }
    let (lock, socket) = places("only");
    let script = "echo pid $$; exec sleep 1000";
    let keeper = Keeper::start(&lock, &socket, script);
    let line = keeper.says("pid ");
    let pid = line.rsplit(' ').next().unwrap().to_owned();
    // Of the same device: nothing is left to do.
    let mut second = Keeper::start(&lock, &socket, script);
    assert!(second.process.wait().unwrap().success());
    // Of another device, at the same socket: it waits for its turn.
    let other = lock.with_file_name("8-uuid-virtio_file-0");
    File::create(&other).unwrap();
    let next = Keeper::start(&other, &socket, script);
    assert!(next.lines.recv_timeout(Duration::from_millis(300)).is_err());
    assert!(lives(&pid));
    keeper.end();
    assert!(!lives(&pid));
    let line = next.says("pid ");
    // A keeper that is killed has no time for that: the kernel does it.
    let Keeper { mut process, .. } = next;
    process.kill().unwrap();
    process.wait().unwrap();
    let pid = line.rsplit(' ').next().unwrap().to_owned();
    let began = Instant::now();
    while lives(&pid) {
        assert!(began.elapsed() < LIMIT, "the program outlives its keeper");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The device has gone before its keeper had the lock.
#[test]
fn a_keeper_that_comes_too_late_ends() {
    let (lock, socket) = places("late");
    std::fs::remove_file(&lock).unwrap();
    let mut keeper = Keeper::start(&lock, &socket, "echo runs");
    assert!(keeper.process.wait().unwrap().success());
    assert!(keeper.lines.recv_timeout(LIMIT).is_err());
}
