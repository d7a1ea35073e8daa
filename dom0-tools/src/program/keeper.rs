//! The process that keeps a back-end's program running.

use super::{ProgramSpec, Whose, lock, user_named};
use crate::connections::connect_to;
use crate::text::{Lines, without_controls};
use crate::worker::sandbox;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal as Signals, kill, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{self, Gid, Uid, setgid, setgroups, setsid, setuid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fchown, fstat, open};
use rustix::process::{
    Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use std::convert::Infallible;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use xen_virtio_backend::LogLimit;

/// The arguments that make `xen-virtiod` a keeper, and its program's beginning.
pub const ARGUMENT: &str = "back-end";
pub const PROGRAM_ARGUMENT: &str = "back-end-program";

/// The first wait before a program that has ended is started again; it doubles to the longest one.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// One that has run for so long has not failed at once.
const LONG_RUN: Duration = Duration::from_secs(5);
/// How long a program may take to end when it is told to.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks whether another program has let go of the socket: nothing tells of it.
const SOCKET_LOOK: Duration = Duration::from_millis(50);
/// Rounds in which what a program has started is ended: it may start more meanwhile.
const ENDING_ROUNDS: u32 = 100;

/// Lines of a program that are logged in a minute; its guest may cause them.
const LINES: u32 = 60;
/// Processes and threads that its user may have.
const MAX_PROCESSES: u64 = 512;

/// What a keeper is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Keeping {
    /// The file that says what is kept running, and whose lock says that it is.
    lock: PathBuf,
    #[command(flatten)]
    whose: Whose,
}

/// What a program is told before it is one.
#[derive(Clone, Debug, clap::Args)]
pub struct Becoming {
    #[arg(long)]
    user: String,
    /// The process that keeps it.
    #[arg(long)]
    keeper: i32,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    words: Vec<String>,
}

/// Keeps a program running until it is told to end.
///
/// # Errors
///
/// What keeps it from that. What the program fails of is logged.
pub fn run(keeping: &Keeping) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signals::SIGTERM);
    signals.thread_block()?;
    let ending = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let own = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&keeping.lock);
    let Ok(mut own) = own else {
        // The device is gone already.
        return Ok(());
    };
    if !lock(&own)? || own.metadata()?.nlink() == 0 {
        return Ok(());
    }
    // By the descriptor that has the lock: to close another one of the file gives it up (fcntl(2)).
    let mut spec = Vec::new();
    own.read_to_end(&mut spec)?;
    // What the program starts, and does not end, is this process's to end.
    prctl::set_child_subreaper(true)?;
    let keeper = Keeper {
        lock: &keeping.lock,
        whose: &keeping.whose,
        spec: serde_json::from_slice(&spec).context("the lock does not say what to run")?,
        ending,
        printed: LogLimit::new(LINES),
        told: LogLimit::default(),
    };
    keeper.keep()
}

/// Becomes the program: with the rights of its user, and no way to others.
///
/// # Errors
///
/// What keeps it from that.
pub fn become_program(becoming: &Becoming) -> Result<Infallible> {
    let (uid, gid) = user_named(&becoming.user)?;
    sandbox::goes_before_the_service()?;
    // No terminal, and a group of its own, by which it is ended with what it has started.
    setsid()?;
    setgroups(&[]).context("setting the groups aside")?;
    setgid(gid)?;
    setuid(uid)?;
    setrlimit(Resource::RLIMIT_NPROC, MAX_PROCESSES, MAX_PROCESSES)?;
    // That is for workers.
    setrlimit(Resource::RLIMIT_NICE, 0, 0)?;
    prctl::set_no_new_privs()?;
    // A keeper that is killed takes it along; one that was killed before this line is not there.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    ensure!(
        unistd::getppid().as_raw() == becoming.keeper,
        "the keeper has ended"
    );
    SigSet::empty().thread_set_mask()?;
    let (program, arguments) = becoming.words.split_first().context("no program")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Err(command.exec()).with_context(|| format!("starting {program}"))
}

struct Keeper<'a> {
    lock: &'a Path,
    whose: &'a Whose,
    spec: ProgramSpec,
    /// Readable when it is to end.
    ending: SignalFd,
    /// What the program prints, and what is said of it.
    printed: LogLimit,
    told: LogLimit,
}

impl Keeper<'_> {
    fn keep(mut self) -> Result<()> {
        let Some(_socket_lock) = self.lock_socket()? else {
            return Ok(());
        };
        let mut wait = FIRST_WAIT;
        loop {
            let began = Instant::now();
            let how = match self.prepare().and_then(|()| self.run_once()) {
                Ok(Some(how)) => how,
                Ok(None) => return Ok(()),
                Err(error) => format!("{error:#}"),
            };
            if began.elapsed() >= LONG_RUN {
                wait = FIRST_WAIT;
            }
            self.tell(&format!(
                "{how}; it is started again in {} ms",
                wait.as_millis()
            ));
            if self.is_to_end(wait)? {
                return Ok(());
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Waits until no other keeper has a program at the socket: that of a guest that ends, for one that begins again. `None`
    /// if it is to end.
    fn lock_socket(&mut self) -> Result<Option<fs::File>> {
        let name = self.spec.socket.to_string_lossy().replace('/', "%");
        let all = self
            .lock
            .ancestors()
            .nth(2)
            .context("a lock in no folder")?;
        let path = all.join("sockets").join(name);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).mode(0o600);
        let file = options
            .open(&path)
            .with_context(|| format!("making {}", path.display()))?;
        let began = Instant::now();
        let mut is_told = false;
        while !lock(&file)? {
            if !is_told && began.elapsed() > END_LIMIT {
                is_told = true;
                let socket = self.spec.socket.display().to_string();
                self.tell(&format!(
                    "another program has the socket {socket}, and is waited for"
                ));
            }
            if self.is_to_end(SOCKET_LOOK)? {
                return Ok(None);
            }
        }
        Ok(Some(file))
    }

    /// Makes the socket's folder, if it is not there, and removes what an earlier program has left in it.
    fn prepare(&self) -> Result<()> {
        let (uid, gid) = user_named(&self.spec.user)?;
        let socket = &self.spec.socket;
        let folder = socket.parent().context("the socket has no folder")?;
        give_folder(folder, uid, gid).with_context(|| format!("making {}", folder.display()))?;
        match fs::symlink_metadata(socket) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Ok(found) if found.file_type().is_socket() => {}
            _ => bail!("{} is there, and is no socket: remove it", socket.display()),
        }
        ensure!(
            connect_to(socket).is_err(),
            "somebody else listens at {}: end that program, or set no exec",
            socket.display()
        );
        match fs::remove_file(socket) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", socket.display()))
            }
            _ => Ok(()),
        }
    }

    /// Runs the program: how it has ended, or `None` if it was told to.
    fn run_once(&mut self) -> Result<Option<String>> {
        let (output, theirs) = pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let program = self.spec.words[0].clone();
        let child = Command::new("/proc/self/exe")
            .arg0("xen-virtiod")
            .args([PROGRAM_ARGUMENT, "--user", &self.spec.user, "--keeper"])
            .arg(std::process::id().to_string())
            .arg("--")
            .args(&self.spec.words)
            .stdin(Stdio::null())
            .stdout(theirs.try_clone()?)
            .stderr(theirs)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let mut running = Running {
            child,
            is_reaped: false,
        };
        let process = running.process()?;
        let mut lines = Lines::new(output);
        let mut is_open = true;
        loop {
            let mut events = [
                PollFd::new(&self.ending, PollFlags::IN),
                PollFd::new(&process, PollFlags::IN),
                PollFd::new(lines.pipe(), PollFlags::IN),
            ];
            // What is closed would be ready always.
            match poll(&mut events[..2 + usize::from(is_open)], None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let [is_to_end, has_ended, has_said] = events.map(|event| !event.revents().is_empty());
            if has_said {
                is_open = lines.read(|line| self.pass_on(line));
            }
            if is_to_end {
                // An error means that it has ended.
                let _ = pidfd_send_signal(&process, Signal::TERM);
                waits_for(PollFd::new(&process, PollFlags::IN), END_LIMIT)?;
                return Ok(None);
            }
            if has_ended {
                if is_open && lines.read(|line| self.pass_on(line)) {
                    lines.finish(|line| self.pass_on(line));
                }
                let status = running.end()?;
                return Ok(Some(format!("{program} has ended ({status})")));
            }
        }
    }

    /// Whether it is told to end within `limit`.
    fn is_to_end(&self, limit: Duration) -> Result<bool> {
        waits_for(PollFd::new(&self.ending, PollFlags::IN), limit)
    }

    /// Logs what the program has printed.
    fn pass_on(&mut self, line: &[u8]) {
        if self.printed.allow() {
            let line = without_controls(String::from_utf8_lossy(line).chars());
            let (domid, device) = (self.whose.domid, &self.whose.device);
            tracing::info!(guest = self.whose.guest, domid, device, "{line}");
        }
    }

    /// Logs what has become of it.
    fn tell(&mut self, what: &str) {
        if self.told.allow() {
            let (domid, device) = (self.whose.domid, &self.whose.device);
            tracing::warn!(guest = self.whose.guest, domid, device, "{what}");
        }
    }
}

/// A program, which ends with all that it has started when this is dropped.
struct Running {
    child: Child,
    is_reaped: bool,
}

impl Running {
    fn process(&self) -> Result<OwnedFd> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(pidfd_open(
            pid.context("no process number")?,
            PidfdFlags::empty(),
        )?)
    }
}

impl Running {
    /// Ends it with its group: how it has ended.
    fn end(&mut self) -> io::Result<ExitStatus> {
        // Its number is its own until it is waited for, and then somebody else's.
        if !std::mem::replace(&mut self.is_reaped, true) {
            let _ = self.child.kill();
            if let Ok(pid) = i32::try_from(self.child.id()) {
                let _ = killpg(unistd::Pid::from_raw(pid), Signals::SIGKILL);
            }
        }
        self.child.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.end();
        // What has left its group is this process's own child by now, as its subreaper.
        for _ in 0..ENDING_ROUNDS {
            for pid in children() {
                let _ = kill(pid, Signals::SIGKILL);
            }
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Err(_) => return,
                Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(1)),
                Ok(_) => {}
            }
        }
    }
}

/// This process's children.
fn children() -> Vec<unistd::Pid> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let children = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // Behind the name, which may be anything, in brackets: the state, and the parent (proc_pid_stat(5)).
        let (_, rest) = stat.rsplit_once(')')?;
        (rest.split_whitespace().nth(1)? == own).then_some(unistd::Pid::from_raw(pid))
    });
    children.collect()
}

/// Makes a folder for the user, if it is not there, or was made and not given away.
fn give_folder(folder: &Path, uid: Uid, gid: Gid) -> Result<()> {
    if !folder.exists() {
        if let Some(above) = folder.parent() {
            fs::create_dir_all(above)?;
        }
        DirBuilder::new().mode(0o700).create(folder)?;
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(folder) = open(folder, flags, Mode::empty()) else {
        // A link is somebody's own arrangement.
        return Ok(());
    };
    let found = fstat(&folder)?;
    if found.st_uid == 0 && found.st_mode & 0o777 == 0o700 {
        let owner = rustix::fs::Uid::from_raw(uid.as_raw());
        let group = rustix::fs::Gid::from_raw(gid.as_raw());
        fchown(&folder, Some(owner), Some(group))?;
    }
    Ok(())
}

/// Whether something happens within `limit`.
fn waits_for(what: PollFd<'_>, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        match poll(&mut [what.clone()], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
