//! Back-ends that the service itself starts: each a program with a user of its own, which is started again when it ends.
//!
//! A process of ours, its keeper, does that: programs outlive the service like workers do, and the next service finds the
//! keepers by their locks.

pub mod keeper;

use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use crate::worker::sandbox;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Gid, Uid, User};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the keepers' locks are, for root only.
const DIRECTORY: &str = "/run/xen-virtiod/back-ends";
/// What stands for the socket in a program's arguments.
const SOCKET_WORD: &str = "{socket}";

/// What is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Exec {
    /// Words between blanks.
    Line(String),
    Words(Vec<String>),
}

impl Exec {
    /// The program and its arguments, with `socket` in its place.
    ///
    /// # Errors
    ///
    /// If that is no program, or it does not say where the socket is.
    pub(crate) fn words(&self, socket: &Path) -> Result<Vec<String>> {
        let words: Vec<String> = match self {
            Self::Line(line) => line.split_whitespace().map(str::to_owned).collect(),
            Self::Words(words) => words.clone(),
        };
        let program = words.first().context("exec = names no program")?;
        ensure!(
            program.starts_with('/'),
            "exec = {program:?} … is no absolute path of a program"
        );
        ensure!(
            words.iter().any(|word| word.contains(SOCKET_WORD)),
            "exec = has no {SOCKET_WORD}, which stands for the socket's path in the program's arguments"
        );
        let socket = socket.to_str().context("the socket's path is no text")?;
        let replaced = |word: &String| word.replace(SOCKET_WORD, socket);
        Ok(words.iter().map(replaced).collect())
    }
}

/// Whom a program runs as.
///
/// # Errors
///
/// If there is no such user, or it is root.
pub(crate) fn user_named(name: &str) -> Result<(Uid, Gid)> {
    let (uid, gid) = match name.parse() {
        Ok(number) => (Uid::from_raw(number), Gid::from_raw(number)),
        Err(_) => {
            let user = User::from_name(name).with_context(|| format!("user = {name:?}"))?;
            let user = user.with_context(|| {
                format!("user = {name:?} is nobody here: useradd --system {name}")
            })?;
            (user.uid, user.gid)
        }
    };
    ensure!(
        !uid.is_root() && gid.as_raw() != 0,
        "user = {name:?} would have the rights of root: give the program a user of its own"
    );
    if let Some(domid) = sandbox::guest_of(uid.as_raw()) {
        bail!(
            "user = {name:?} is whom guest {domid}'s worker runs as: give the program a user of its own"
        );
    }
    Ok((uid, gid))
}

/// A program of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    lock: PathBuf,
    /// Whose it is, for its log lines.
    label: String,
    socket: PathBuf,
    user: String,
    words: Vec<String>,
}

impl Program {
    /// That of a guest's device. It serves at `socket`.
    pub(crate) fn new(
        (guest, name): (&Identity, &str),
        key: EntryKey,
        socket: &Path,
        user: &str,
        words: Vec<String>,
    ) -> Self {
        let file = format!(
            "{}-{}",
            guest.file_name(),
            key.to_string().replace('/', "-")
        );
        Self {
            lock: Path::new(DIRECTORY).join(file),
            label: format!("guest {name} ({}): {key}", guest.domid),
            socket: socket.to_owned(),
            user: user.to_owned(),
            words,
        }
    }

    /// Has it run from here on, if it does not yet.
    ///
    /// # Errors
    ///
    /// What keeps its keeper from being started. What keeps the program from it the keeper says.
    pub(crate) fn keep_running(&self) -> Result<()> {
        make_directory()?;
        let options = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .mode(0o600)
                .clone()
        };
        let what = || format!("making {}", self.lock.display());
        let file = options().open(&self.lock).with_context(what)?;
        if keeper_of(&file)?.is_some() {
            return Ok(());
        }
        let mut child = Command::new("/proc/self/exe")
            .arg0("xen-virtiod")
            .arg(keeper::ARGUMENT)
            .arg(&self.lock)
            .args(["--label", &self.label, "--user", &self.user, "--socket"])
            .arg(&self.socket)
            .arg("--")
            .args(&self.words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // An interrupt from the terminal is the service's.
            .process_group(0)
            .spawn()
            .context("starting a back-end's keeper")?;
        // Whoever has started it hears of its end; nothing follows from that here.
        let reaper = std::thread::Builder::new().name("keeper".to_owned());
        let _ = reaper.spawn(move || child.wait());
        Ok(())
    }

    /// Ends it, without waiting for that.
    pub(crate) fn end(&self) {
        end_keeper(&self.lock);
    }
}

/// Ends the programs of a guest, which is gone.
pub(crate) fn end_of(guest: &Identity) {
    let prefix = format!("{}-", guest.file_name());
    for (name, path) in locks() {
        if name.starts_with(&prefix) {
            end_keeper(&path);
        }
    }
}

/// Ends the programs that an earlier service has left, of guests of which `living` says the domid and nothing.
///
/// # Errors
///
/// What `living` says.
pub(crate) fn sweep<E>(
    mut living: impl FnMut(u16) -> Result<Option<Identity>, E>,
) -> Result<(), E> {
    for (name, path) in locks() {
        let domid = name.split('-').next().and_then(|domid| domid.parse().ok());
        let guest = domid.map(&mut living).transpose()?.flatten();
        if !guest.is_some_and(|guest| name.starts_with(&format!("{}-", guest.file_name()))) {
            end_keeper(&path);
        }
    }
    Ok(())
}

fn locks() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let named =
        entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    named.collect()
}

fn make_directory() -> Result<()> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIRECTORY);
    made.with_context(|| format!("making {DIRECTORY}"))
}

/// Removes a lock, and ends the keeper that has it, if there is one: one that comes too late for it ends by itself.
fn end_keeper(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let _ = fs::remove_file(path);
    let keeper = file.ok().and_then(|file| keeper_of(&file).ok().flatten());
    if let Some(keeper) = keeper {
        // An error means that it has ended.
        let _ = pidfd_send_signal(&keeper, Signal::TERM);
    }
}

/// The process that has the lock `file`.
fn keeper_of(file: &File) -> Result<Option<OwnedFd>> {
    let Some(pid) = holder(file)? else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        // It has the lock still, so that this is no later process of its number.
        Ok(process) if holder(file)? == Some(pid) => Ok(Some(process)),
        Ok(_) | Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error).context("opening a back-end's keeper"),
    }
}

fn holder(file: &File) -> Result<Option<Pid>> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_GETLK(&mut lock)).context("asking for a back-end's keeper")?;
    let is_locked = i32::from(lock.l_type) != libc::F_UNLCK;
    Ok(Pid::from_raw(lock.l_pid).filter(|_| is_locked))
}

/// Locks `file` for this process. False if another one has it.
fn lock(file: &File) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_SETLK(&whole_file())) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).expect("a small number"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("a small number"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gets_its_socket_where_it_is_said() {
        let socket = Path::new("/run/g.sock");
        let line = Exec::Line("/usr/libexec/virtiofsd --socket-path={socket}  --xattr".to_owned());
        let words = [
            "/usr/libexec/virtiofsd",
            "--socket-path=/run/g.sock",
            "--xattr",
        ];
        assert_eq!(line.words(socket).unwrap(), words);
        let listed = Exec::Words(vec!["/bin/a b".to_owned(), "{socket}".to_owned()]);
        assert_eq!(listed.words(socket).unwrap(), ["/bin/a b", "/run/g.sock"]);
        for (line, wrong) in [
            ("", "names no program"),
            ("virtiofsd {socket}", "no absolute path"),
            (
                "/bin/virtiofsd --socket-path=/run/g.sock",
                "has no {socket}",
            ),
        ] {
            let error = Exec::Line(line.to_owned()).words(socket).unwrap_err();
            assert!(error.to_string().contains(wrong), "{line}: {error}");
        }
    }

    #[test]
    fn nobody_runs_as_root() {
        for name in ["root", "0"] {
            let error = user_named(name).unwrap_err().to_string();
            assert!(error.contains("rights of root"), "{error}");
        }
        let error = user_named("no-such-user").unwrap_err().to_string();
        assert!(error.contains("useradd"), "{error}");
        let error = user_named(&sandbox::user(7).to_string()).unwrap_err();
        assert!(error.to_string().contains("guest 7's worker"), "{error}");
        assert_eq!(user_named("4711").unwrap().0.as_raw(), 4711);
    }
}
