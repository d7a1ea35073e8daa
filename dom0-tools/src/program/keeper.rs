//! The process that keeps a back-end's program running.

use super::{lock, user_named};
use crate::text::without_controls;
use crate::worker::sandbox;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal as Signals};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use std::convert::Infallible;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, PipeReader, Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
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

/// Lines of a program that are logged in a minute; its guest may cause them.
const LINES: u32 = 60;
const MAX_LINE: usize = 1024;

/// What a keeper is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Keeping {
    /// The file whose lock says that it is there.
    lock: PathBuf,
    /// Whose the program is.
    #[arg(long)]
    label: String,
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    user: String,
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
    let Ok(own) = own else {
        // The device is gone already.
        return Ok(());
    };
    if !lock(&own)? || own.metadata()?.nlink() == 0 {
        return Ok(());
    }
    let keeper = Keeper {
        keeping,
        ending,
        printed: LogLimit::new(LINES),
        told: LogLimit::default(),
    };
    keeper.keep()
}

/// Becomes the program: with the rights of `user`, and no way to others.
///
/// # Errors
///
/// What keeps it from that.
pub fn become_program(user: &str, words: &[String]) -> Result<Infallible> {
    let (uid, gid) = user_named(user)?;
    sandbox::goes_before_the_service()?;
    setgroups(&[]).context("setting the groups aside")?;
    setgid(gid)?;
    setuid(uid)?;
    nix::sys::prctl::set_no_new_privs()?;
    // A keeper that is killed leaves nothing behind.
    set_parent_process_death_signal(Some(Signal::TERM))?;
    SigSet::empty().thread_set_mask()?;
    let (program, arguments) = words.split_first().context("no program")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Err(command.exec()).with_context(|| format!("starting {program}"))
}

struct Keeper<'a> {
    keeping: &'a Keeping,
    /// Readable when it is to end.
    ending: SignalFd,
    /// What the program prints, and what is said of it.
    printed: LogLimit,
    told: LogLimit,
}

impl Keeper<'_> {
    fn keep(mut self) -> Result<()> {
        let (uid, gid) = user_named(&self.keeping.user)?;
        let Some(_socket_lock) = self.lock_socket()? else {
            return Ok(());
        };
        let mut wait = FIRST_WAIT;
        loop {
            let began = Instant::now();
            let how = match self.prepare(uid, gid).and_then(|()| self.run_once()) {
                Ok(Some(how)) => how,
                Ok(None) => return Ok(()),
                Err(error) => format!("{error:#}"),
            };
            if began.elapsed() >= LONG_RUN {
                wait = FIRST_WAIT;
            }
            if self.told.allow() {
                let Keeping { label, .. } = self.keeping;
                tracing::warn!(
                    "{label}: {how}; it is started again in {} ms",
                    wait.as_millis()
                );
            }
            if self.is_to_end(wait)? {
                return Ok(());
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Waits until no other keeper has a program at the socket: that of a guest that ends, for one that begins again. `None`
    /// if it is to end.
    fn lock_socket(&self) -> Result<Option<fs::File>> {
        let name = self.keeping.socket.to_string_lossy().replace('/', "%");
        let path = self.keeping.lock.with_file_name(format!("socket-{name}"));
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).mode(0o600);
        let file = options
            .open(&path)
            .with_context(|| format!("making {}", path.display()))?;
        while !lock(&file)? {
            if self.is_to_end(SOCKET_LOOK)? {
                return Ok(None);
            }
        }
        Ok(Some(file))
    }

    /// Makes the socket's folder, if it is not there, and removes what an earlier program has left in it.
    fn prepare(&self, uid: Uid, gid: Gid) -> Result<()> {
        let socket = &self.keeping.socket;
        let folder = socket.parent().context("the socket has no folder")?;
        if !folder.exists() {
            let what = || format!("making {}", folder.display());
            if let Some(above) = folder.parent() {
                fs::create_dir_all(above).with_context(what)?;
            }
            let made = DirBuilder::new().mode(0o700).create(folder);
            made.with_context(what)?;
            chown(folder, Some(uid.as_raw()), Some(gid.as_raw())).with_context(what)?;
        }
        match fs::symlink_metadata(socket) {
            Ok(found) if found.file_type().is_socket() => match fs::remove_file(socket) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("removing {}", socket.display()))
                }
                _ => Ok(()),
            },
            Ok(_) => bail!("{} is there, and is no socket: remove it", socket.display()),
            Err(_) => Ok(()),
        }
    }

    /// Runs the program: how it has ended, or `None` if it was told to.
    fn run_once(&mut self) -> Result<Option<String>> {
        let (output, theirs) = pipe()?;
        let program = &self.keeping.words[0];
        let mut child = Command::new("/proc/self/exe")
            .arg0("xen-virtiod")
            .args([PROGRAM_ARGUMENT, "--user", &self.keeping.user, "--"])
            .args(&self.keeping.words)
            .stdin(Stdio::null())
            .stdout(theirs.try_clone()?)
            .stderr(theirs)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let process = pidfd_open(pid.context("no process number")?, PidfdFlags::empty())?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let mut lines = Lines {
            output,
            begun: Vec::new(),
        };
        let mut is_open = true;
        loop {
            let output = if is_open {
                PollFlags::IN
            } else {
                PollFlags::empty()
            };
            let mut events = [
                PollFd::new(&self.ending, PollFlags::IN),
                PollFd::new(&process, PollFlags::IN),
                PollFd::new(&lines.output, output),
            ];
            match poll(&mut events, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let [is_to_end, has_ended, has_said] = events.map(|event| !event.revents().is_empty());
            if has_said {
                is_open = lines.read(|line| self.pass_on(line));
            }
            if is_to_end {
                end(&mut child, &process)?;
                return Ok(None);
            }
            if has_ended {
                lines.read(|line| self.pass_on(line));
                let status = child.wait()?;
                return Ok(Some(format!("{program} has ended ({status})")));
            }
        }
    }

    /// Whether it is told to end within `limit`.
    fn is_to_end(&self, limit: Duration) -> Result<bool> {
        waits_for(PollFd::new(&self.ending, PollFlags::IN), limit)
    }

    /// Logs what the program has printed.
    fn pass_on(&mut self, line: &str) {
        if self.printed.allow() {
            let line = without_controls(line.chars());
            tracing::info!("{}: {line}", self.keeping.label);
        }
    }
}

/// Ends the program, and waits for that.
fn end(child: &mut Child, process: &OwnedFd) -> Result<()> {
    // An error means that it has ended.
    let _ = pidfd_send_signal(process, Signal::TERM);
    if !waits_for(PollFd::new(process, PollFlags::IN), END_LIMIT)? {
        let _ = child.kill();
    }
    child.wait()?;
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

/// What a program prints, line by line.
struct Lines {
    output: PipeReader,
    begun: Vec<u8>,
}

impl Lines {
    /// Hands what is there to `line`. False once there will be no more.
    fn read(&mut self, mut line: impl FnMut(&str)) -> bool {
        let mut bytes = [0; 4096];
        let len = match self.output.read(&mut bytes) {
            Ok(0) => return false,
            Ok(len) => len,
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        };
        for &byte in &bytes[..len] {
            if byte != b'\n' {
                self.begun.push(byte);
            }
            if byte == b'\n' || self.begun.len() == MAX_LINE {
                line(&String::from_utf8_lossy(&self.begun));
                self.begun.clear();
            }
        }
        true
    }
}
