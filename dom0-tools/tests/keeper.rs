//! The process that keeps a back-end's program running. Only root can give that another user.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
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
    fn start(lock: &Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_xen-virtiod"))
            .arg("back-end")
            .arg(lock)
            .args(["--guest=g", "--domid=7", "--device=virtio_file/0"])
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

    /// The numbers in the next line of them.
    fn pids(&self) -> Vec<String> {
        let line = self.says(": pid ");
        let (_, pids) = line.split_once(": pid ").unwrap();
        pids.split(' ').map(str::to_owned).collect()
    }

    fn end(mut self) {
        let pid = Pid::from_raw(self.process.id().try_into().unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Keeper {
    /// Also where a test fails: nothing of it stays.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A folder for a test, with those for locks.
fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("keeper-{name}-{}", std::process::id()));
    for name in ["devices", "sockets"] {
        std::fs::create_dir_all(dir.join(name)).unwrap();
    }
    dir
}

/// The lock of device `key`, whose program is a shell's script, at a socket in a folder that is not there.
fn lock(dir: &Path, key: &str, script: &str) -> PathBuf {
    let lock = dir.join("devices").join(key);
    let spec = serde_json::json!({
        "socket": dir.join("own/g.sock"),
        "user": USER.to_string(),
        "words": ["/bin/sh", "-c", script],
    });
    std::fs::write(&lock, spec.to_string()).unwrap();
    lock
}

fn lives(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[test]
fn a_program_runs_as_its_user_and_is_started_again() {
    if !geteuid().is_root() {
        return;
    }
    let dir = folder("again");
    let script = "echo as $(id -u) $(id -G), $(grep NoNewPrivs /proc/self/status) $(cat /proc/self/oom_score_adj); \
                  printf 'last words'; exit 3";
    let keeper = Keeper::start(&lock(&dir, "7-uuid-virtio_file-0", script));
    let first = keeper.says("as ");
    let expected = "guest g (7): virtio_file/0: as 4711 4711, NoNewPrivs: 1 500";
    assert!(first.contains(expected), "{first}");
    keeper.says("last words");
    keeper.says("/bin/sh has ended (exit status: 3); it is started again in 100 ms");
    keeper.says("as 4711");
    keeper.says("it is started again in 200 ms");
    let folder = dir.join("own").metadata().unwrap();
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
    let dir = folder("only");
    // With what it has started, and what has left its group.
    let script = "trap '' TERM; sleep 1000 & echo pid $$ $!; setsid sh -c 'echo pid $$; exec sleep 1000' & sleep 1000";
    let of_one = lock(&dir, "7-uuid-virtio_file-0", script);
    let keeper = Keeper::start(&of_one);
    let mut pids = keeper.pids();
    pids.extend(keeper.pids());
    assert_eq!(pids.len(), 3);
    // Of the same device: nothing is left to do.
    let mut second = Keeper::start(&of_one);
    assert!(second.process.wait().unwrap().success());
    // Of another device, at the same socket: it waits for its turn.
    let next = Keeper::start(&lock(
        &dir,
        "8-uuid-virtio_file-0",
        "echo pid $$; exec sleep 1000",
    ));
    assert!(next.lines.recv_timeout(Duration::from_millis(300)).is_err());
    assert!(pids.iter().all(|pid| lives(pid)));
    keeper.end();
    assert!(!pids.iter().any(|pid| lives(pid)));
    let pids = next.pids();
    // A keeper that is killed has no time for that: the kernel does it.
    drop(next);
    let began = Instant::now();
    while lives(&pids[0]) {
        assert!(began.elapsed() < LIMIT, "the program outlives its keeper");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A program that closes its output is waited for without looking at it again and again.
#[test]
fn a_silent_program_costs_its_keeper_nothing() {
    if !geteuid().is_root() {
        return;
    }
    let dir = folder("silent");
    let script = "echo pid $$; exec sleep 1000 >/dev/null 2>&1";
    let keeper = Keeper::start(&lock(&dir, "7-uuid-virtio_file-0", script));
    keeper.pids();
    std::thread::sleep(Duration::from_millis(500));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", keeper.process.id())).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Ticks of 10 ms in user and system mode.
    let ticks: u32 = fields[11..13]
        .iter()
        .map(|ticks| ticks.parse::<u32>().unwrap())
        .sum();
    assert!(ticks < 20, "{ticks} ticks");
    keeper.end();
}

/// Another program listens at the socket already.
#[test]
fn nobody_elses_socket_is_taken() {
    if !geteuid().is_root() {
        return;
    }
    let dir = folder("taken");
    std::fs::create_dir(dir.join("own")).unwrap();
    let _other = UnixListener::bind(dir.join("own/g.sock")).unwrap();
    let keeper = Keeper::start(&lock(&dir, "7-uuid-virtio_file-0", "echo runs"));
    keeper.says("somebody else listens at");
    assert!(dir.join("own/g.sock").exists());
    keeper.end();
}

/// The device has gone before its keeper had the lock.
#[test]
fn a_keeper_that_comes_too_late_ends() {
    let of_one = lock(&folder("late"), "7-uuid-virtio_file-0", "echo runs");
    std::fs::remove_file(&of_one).unwrap();
    let mut keeper = Keeper::start(&of_one);
    assert!(keeper.process.wait().unwrap().success());
    assert!(keeper.lines.recv_timeout(LIMIT).is_err());
}
