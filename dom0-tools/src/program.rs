//! Back-ends that the service itself starts: each a program with a user of its own, which is started again when it ends.
//!
//! A process of ours, its keeper, does that: programs outlive the service like workers do, and the next service finds the
//! keepers by their locks.

pub mod keeper;

use crate::devices::Busy;
use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use crate::worker::sandbox;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Gid, Uid};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the keepers' locks are, for root only: below `devices`, with what each keeps running, and `sockets`.
const DIRECTORY: &str = "/run/xen-virtiod/back-ends";
/// What stands for the socket in a program's arguments.
pub(crate) const SOCKET_WORD: &str = "{socket}";

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
    /// If that is no program.
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
        let socket = socket.to_str().context("the socket's path is no text")?;
        let replaced = |word: &String| word.replace(SOCKET_WORD, socket);
        Ok(words.iter().map(replaced).collect())
    }
}

/// Judges whom a program is to run as, of whom nothing has to be there yet.
///
/// # Errors
///
/// If it would have rights that no program is to have.
pub(crate) fn check_user(name: &str) -> Result<()> {
    let number = name.parse().ok();
    ensure!(
        name != "root" && number != Some(0),
        "user = {name:?} would have the rights of root: give the program a user of its own"
    );
    if let Some(domid) = number.and_then(sandbox::guest_of) {
        bail!(
            "user = {name:?} is whom guest {domid}'s worker runs as: give the program a user of its own"
        );
    }
    Ok(())
}

/// The users that there are. Read here: what a static program loads to ask for them may be of another libc.
const PASSWD: &str = "/etc/passwd";

/// Whom a program runs as: a name of `/etc/passwd`, or a number.
///
/// # Errors
///
/// If there is no such user, or as [`check_user`].
pub(crate) fn user_named(name: &str) -> Result<(Uid, Gid)> {
    let users = fs::read_to_string(PASSWD).with_context(|| format!("reading {PASSWD}"))?;
    let user = users.lines().find_map(|line| user_in(line, name));
    // A number that is nobody's stands for its group too.
    let number = name.parse().ok().map(|number| (number, number));
    let (uid, gid) = user.or(number).with_context(|| {
        format!("user = {name:?} is nobody in {PASSWD}: useradd --system {name}")
    })?;
    check_user(name)?;
    check_user(&uid.to_string())?;
    ensure!(
        gid != 0,
        "user = {name:?} has the group of root: give the program a user of its own"
    );
    Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
}

/// The user and the group of a line of `/etc/passwd` (passwd(5)), if it is that of `wanted`, a name or a number.
fn user_in(line: &str, wanted: &str) -> Option<(u32, u32)> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (fields.next()?, fields.next()?);
    let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
    let is_it = name == wanted || wanted.parse() == Ok(uid);
    is_it.then_some((uid, gid))
}

/// A program of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    lock: PathBuf,
    whose: Whose,
    spec: ProgramSpec,
}

/// Whose device a program is of, for log lines.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub(crate) struct Whose {
    #[arg(long)]
    pub(crate) guest: String,
    #[arg(long)]
    pub(crate) domid: u16,
    #[arg(long)]
    pub(crate) device: String,
}

/// What is kept running, which a keeper's lock says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ProgramSpec {
    socket: PathBuf,
    user: String,
    words: Vec<String>,
}

impl ProgramSpec {
    /// What the lock `file` says.
    fn of(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }
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
        Self {
            lock: lock_path(guest, key),
            whose: Whose {
                guest: name.to_owned(),
                domid: guest.domid,
                device: key.to_string(),
            },
            spec: ProgramSpec {
                socket: socket.to_owned(),
                user: user.to_owned(),
                words,
            },
        }
    }

    /// Whose it is.
    pub(crate) fn whose(&self) -> &Whose {
        &self.whose
    }

    /// Has it run from here on, if it does not yet.
    ///
    /// # Errors
    ///
    /// What keeps its keeper from being started; [`Busy`] if another device's program is at its socket. What keeps the
    /// program from starting the keeper says.
    pub(crate) fn keep_running(&self) -> Result<()> {
        for name in ["devices", "sockets"] {
            let path = Path::new(DIRECTORY).join(name);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.with_context(|| format!("making {}", path.display()))?;
        }
        if self.lock.exists() {
            if keeper_of(&open_lock(&self.lock)?)?.is_some() {
                if ProgramSpec::of(&self.lock).as_ref() == Some(&self.spec) {
                    return Ok(());
                }
                let (domid, device) = (self.whose.domid, &self.whose.device);
                tracing::info!(
                    guest = self.whose.guest,
                    domid,
                    device,
                    "its program is another one now"
                );
            }
            end_keeper(&self.lock)?;
        }
        self.check_socket()?;
        let what = || format!("making {}", self.lock.display());
        // Not among the locks, where one that was not renamed would pass for another device's.
        let new = Path::new(DIRECTORY).join("new");
        fs::write(&new, serde_json::to_vec(&self.spec)?).with_context(what)?;
        fs::rename(&new, &self.lock).with_context(what)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("xen-virtiod")
            .arg(keeper::ARGUMENT)
            .arg(&self.lock)
            .arg(format!("--guest={}", self.whose.guest))
            .arg(format!("--domid={}", self.whose.domid))
            .arg(format!("--device={}", self.whose.device))
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

    /// A guest is not to have the program of another one's device.
    fn check_socket(&self) -> Result<()> {
        for (name, path) in locks() {
            if path != self.lock
                && ProgramSpec::of(&path).is_some_and(|spec| spec.socket == self.spec.socket)
            {
                let socket = self.spec.socket.display();
                return Err(Busy(format!(
                    "at {socket} is the program of another device, {name}"
                ))
                .into());
            }
        }
        Ok(())
    }
}

/// Ends the program of a guest's device, if it has one, without waiting for that.
pub(crate) fn end_of_device(guest: &Identity, key: EntryKey) {
    end(&lock_path(guest, key));
}

/// Ends the programs of a guest, which is gone.
pub(crate) fn end_of(guest: &Identity) {
    end_others(guest, std::iter::empty());
}

/// Ends the programs of a guest's devices but for `kept`.
pub(crate) fn end_others(guest: &Identity, kept: impl Iterator<Item = EntryKey>) {
    let kept: Vec<PathBuf> = kept.map(|key| lock_path(guest, key)).collect();
    for (name, path) in locks() {
        if name.starts_with(&prefix(guest)) && !kept.contains(&path) {
            end(&path);
        }
    }
}

/// Ends the programs of guests that `living` does not know, by their domid.
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
        if !guest.is_some_and(|guest| name.starts_with(&prefix(&guest))) {
            end(&path);
        }
    }
    Ok(())
}

fn prefix(guest: &Identity) -> String {
    format!("{}-", guest.file_name())
}

/// The lock of the keeper of a guest's device.
fn lock_path(guest: &Identity, key: EntryKey) -> PathBuf {
    let name = prefix(guest) + &key.to_string().replace('/', "-");
    Path::new(DIRECTORY).join("devices").join(name)
}

fn locks() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(Path::new(DIRECTORY).join("devices"));
    let entries = entries.into_iter().flatten().flatten();
    let named =
        entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    named.collect()
}

fn end(path: &Path) {
    match end_keeper(path) {
        Err(error) if path.exists() => tracing::warn!("{}: {error:#}", path.display()),
        _ => {}
    }
}

/// Ends the keeper that has the lock at `path`, if there is one, and removes that: a keeper that comes too late for it ends by
/// itself.
///
/// # Errors
///
/// What keeps it from being found: the lock stays, and with it what is known of it.
fn end_keeper(path: &Path) -> Result<()> {
    if let Some(keeper) = keeper_of(&open_lock(path)?)? {
        // An error means that it has ended.
        let _ = pidfd_send_signal(&keeper, Signal::TERM);
    }
    fs::remove_file(path).context("removing a back-end's lock")
}

fn open_lock(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).open(path);
    opened.with_context(|| format!("opening {}", path.display()))
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
        ] {
            let error = Exec::Line(line.to_owned()).words(socket).unwrap_err();
            assert!(error.to_string().contains(wrong), "{line}: {error}");
        }
    }

    /// Somebody's number stands for that user, with that user's group.
    #[test]
    fn a_user_is_a_line_of_etc_passwd() {
        let man = "man:x:6:12:man:/var/cache/man:/usr/sbin/nologin";
        for (wanted, found) in [
            ("man", Some((6, 12))),
            ("6", Some((6, 12))),
            ("06", Some((6, 12))),
            ("12", None),
            ("x", None),
        ] {
            assert_eq!(user_in(man, wanted), found, "{wanted}");
        }
        for odd in ["", "man", "man:x", "man:x:six:12:", "man:x:6", "+::::::"] {
            assert_eq!(user_in(odd, "man"), None, "{odd}");
        }
    }

    #[test]
    fn nobody_runs_as_root_or_as_a_worker() {
        for name in ["root", "0"] {
            let error = user_named(name).unwrap_err().to_string();
            assert!(error.contains("rights of root"), "{error}");
        }
        let error = user_named("no-such-user").unwrap_err().to_string();
        assert!(error.contains("useradd"), "{error}");
        assert_eq!(user_named("4711").unwrap().1.as_raw(), 4711);
        let error = user_named(&sandbox::user(7).to_string()).unwrap_err();
        assert!(error.to_string().contains("guest 7's worker"), "{error}");
    }
}
