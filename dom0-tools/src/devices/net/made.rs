//! An interface that is made for a guest's device, and given to a bridge by a script of xl's.

use super::interfaces::{self, Request, ask};
use crate::devices::{Busy, open_device};
use crate::toolstack::libxl::{EntryForm, EntryKey, entry_path};
use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use xen_virtio_backend::tap::{self, Queues};

/// xl's own, where Xen's distributions have it.
pub(super) const DEFAULT_SCRIPT: &str = "/etc/xen/scripts/vif-bridge";

/// Where its programs are: a service of systemd's may have less in its own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long a script may take: the guest goes on meanwhile.
const SCRIPT_LIMIT: Duration = Duration::from_secs(30);
const SCRIPT_LOOK: Duration = Duration::from_millis(50);
/// How long a worker may have an interface that is to be removed.
const REMOVAL_LIMIT: Duration = Duration::from_secs(5);

/// The beginnings of the interfaces' names: no other device of ours, and none of Xen's, has such a one.
const OF_TOOLSTACK: &str = "vio";
const OF_FILE: &str = "viof";
const OF_ATTACHED: &str = "vioa";

/// How an interface is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Made {
    pub(super) script: PathBuf,
    pub(super) bridge: Option<String>,
    pub(super) ip: Option<String>,
    pub(super) several_queues: bool,
}

/// Scripts that run, and what is to follow them.
static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

struct Running;

impl Running {
    fn begin() -> Self {
        *running() += 1;
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *running() -= 1;
        RUNNING.1.notify_all();
    }
}

fn running() -> MutexGuard<'static, usize> {
    RUNNING.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until no script runs, and what is to follow them is done. None is begun until what this gives is dropped.
pub(super) fn finish() -> impl Drop {
    let mut running = running();
    while *running > 0 {
        let waited = RUNNING.1.wait(running);
        running = waited.unwrap_or_else(PoisonError::into_inner);
    }
    running
}

/// Interfaces that are being taken away: their devices may have one once more when that is over.
static ENDING: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn ending() -> MutexGuard<'static, BTreeSet<String>> {
    ENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the interface of this name is being taken away.
pub(super) fn is_ending(interface: &str) -> bool {
    ending().contains(interface)
}

/// # Errors
///
/// [`Busy`] while the interface of this name is being taken away, or is to be.
pub(super) fn check_ending(interface: &str) -> Result<()> {
    if is_ending(interface) {
        return Err(Busy(format!("{interface} is being taken from its bridge")).into());
    }
    Ok(())
}

/// An interface is being taken away, until this is dropped.
pub(super) struct Ending(String);

impl Ending {
    fn begin(interface: &str) -> Self {
        ending().insert(interface.to_owned());
        Self(interface.to_owned())
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        ending().remove(&self.0);
    }
}

/// One that was made, until it is taken away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MadeInterface {
    pub(super) made: Made,
    pub(super) interface: String,
    /// Its device's entry.
    pub(super) entry: String,
}

/// The name of the interface of a device.
pub(super) fn name(domid: u16, key: EntryKey) -> String {
    let beginning = match key.form {
        EntryForm::File => OF_FILE,
        EntryForm::Attached => OF_ATTACHED,
        EntryForm::Virtio | EntryForm::Disk => OF_TOOLSTACK,
    };
    format!("{beginning}{domid}.{}", key.devid)
}

/// The device of the interface of this name, and its guest, if it is one that [`name`] has made.
fn device_of(name: &str) -> Option<(u16, EntryKey)> {
    let forms = [
        (OF_FILE, EntryForm::File),
        (OF_ATTACHED, EntryForm::Attached),
        (OF_TOOLSTACK, EntryForm::Virtio),
    ];
    let mut forms = forms.into_iter();
    let (numbers, form) =
        forms.find_map(|(beginning, form)| Some((name.strip_prefix(beginning)?, form)))?;
    let (domid, devid) = numbers.split_once('.')?;
    let devid = devid.parse().ok()?;
    Some((domid.parse().ok()?, EntryKey { form, devid }))
}

impl MadeInterface {
    pub(super) fn new(made: &Made, domid: u16, key: EntryKey) -> Self {
        Self {
            made: made.clone(),
            interface: name(domid, key),
            entry: entry_path(domid, key),
        }
    }

    /// The bridge that xl's own script is to find: another script may know what to do without.
    pub(super) fn own_bridge(&self) -> Option<&str> {
        let is_default = self.made.script == Path::new(DEFAULT_SCRIPT);
        self.made.bridge.as_deref().filter(|_| is_default)
    }

    /// Has the interface outlive its descriptors, of which `queue` is one, and gives it to its bridge.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn begin(&self, queue: &OwnedFd) -> Result<()> {
        tap::set_persistent(queue.as_fd(), true).context("making the interface last")?;
        self.run(Event::Online, || {});
        Ok(())
    }

    /// Takes it from its bridge, and away.
    pub(super) fn end(&self) {
        let (interface, queues) = (self.interface.clone(), queues(self.made.several_queues));
        let ending = Ending::begin(&interface);
        self.run(Event::Offline, move || {
            // Its worker may have it for a moment still.
            let limit = Instant::now() + REMOVAL_LIMIT;
            while let Err(error) = remove(&interface, &[queues]) {
                if Instant::now() >= limit {
                    tracing::warn!("{interface} is not removed: {error:#}");
                    break;
                }
                thread::sleep(SCRIPT_LOOK);
            }
            drop(ending);
        });
    }

    /// It is to be taken away, by whoever has not answered yet: no device has it until what this gives is dropped.
    pub(super) fn is_to_end(&self) -> Ending {
        Ending::begin(&self.interface)
    }

    /// Runs its script, and `then`, where nobody waits for that.
    fn run(&self, event: Event, then: impl FnOnce() + Send + 'static) {
        let this = self.clone();
        let running = Running::begin();
        let thread = thread::Builder::new().name("vif script".to_owned());
        let started = thread.spawn(move || {
            if let Err(error) = this.run_script(event) {
                tracing::error!(
                    "{} {} for {}: {error:#}",
                    this.made.script.display(),
                    event.name(),
                    this.interface
                );
            }
            then();
            drop(running);
        });
        if let Err(error) = started {
            tracing::error!("{}: its script is not run: {error}", self.interface);
        }
    }

    /// With what xl tells such a script: xl-network-configuration(5), and the beginnings of Xen's own.
    fn run_script(&self, event: Event) -> Result<()> {
        let Made {
            script, bridge, ip, ..
        } = &self.made;
        let mut command = Command::new(script);
        command
            .arg(event.name())
            .env("PATH", PATH)
            .env("script", script)
            .env("vif", &self.interface)
            .env("XENBUS_PATH", &self.entry)
            .env("XENBUS_TYPE", "vif")
            .env("XENBUS_BASE_PATH", "backend")
            .env("type_if", "vif")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        for (name, value) in [("bridge", bridge), ("ip", ip)] {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        let mut child = command.spawn().context("starting it")?;
        let status = wait(&mut child)?;
        ensure!(
            status.success(),
            "{status}: what is wrong is in the log of dom0 (vif scripts write it to syslog), and in hotplug-error of {}",
            self.entry
        );
        Ok(())
    }
}

/// What a script is told of.
#[derive(Clone, Copy, Debug)]
enum Event {
    Online,
    Offline,
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
        }
    }
}

/// Waits for a script, which is killed if it takes too long.
fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    let limit = Instant::now() + SCRIPT_LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= limit {
            child.kill()?;
            child.wait()?;
            anyhow::bail!(
                "it has not ended after {} s, and was killed",
                SCRIPT_LIMIT.as_secs()
            );
        }
        thread::sleep(SCRIPT_LOOK);
    }
}

pub(super) fn queues(several: bool) -> Queues {
    match several {
        true => Queues::Several,
        false => Queues::One,
    }
}

/// Removes an interface that has one of these kinds of queues, of which nobody has one.
fn remove(interface: &str, kinds: &[Queues]) -> Result<()> {
    if !interfaces::exists(interface) {
        return Ok(());
    }
    let mut result = Ok(());
    for queues in kinds {
        let tun = open_device("/dev/net/tun".as_ref(), "CONFIG_TUN", OFlags::NONBLOCK)?;
        result = tap::attach(tun.as_fd(), interface, *queues)
            .and_then(|()| tap::set_persistent(tun.as_fd(), false))
            .context("taking it");
        if result.is_ok() {
            break;
        }
    }
    result
}

/// The names of the interfaces that were made.
pub(super) fn names() -> Vec<String> {
    let there = fs::read_dir(interfaces::INTERFACES)
        .into_iter()
        .flatten()
        .flatten();
    let taps = there.filter(|interface| interface.path().join("tun_flags").exists());
    let names = taps.filter_map(|interface| interface.file_name().into_string().ok());
    // One whose script runs still is taken away already.
    let ours = names.filter(|name| device_of(name).is_some() && !is_ending(name));
    ours.collect()
}

/// Removes an interface that was made, whose device is gone.
pub(super) fn remove_left(name: &str) -> Result<()> {
    ensure!(
        device_of(name).is_some(),
        "{name} was made by somebody else"
    );
    if is_ending(name) {
        return Ok(());
    }
    remove(name, &[Queues::One, Queues::Several])
}

/// Removes what was made for devices that are gone: `is_there` tells of those that are not.
///
/// # Errors
///
/// What `is_there` says.
pub(crate) fn sweep<E>(
    mut is_there: impl FnMut(u16, EntryKey) -> Result<bool, E>,
) -> Result<(), E> {
    let names = ask(&Request::Names).map(|answer| answer.names);
    let names = names.unwrap_or_else(|failure| {
        let error = anyhow::Error::from(failure);
        tracing::warn!("interfaces of devices that are gone are not removed: {error:#}");
        Vec::new()
    });
    for name in names {
        let Some((domid, key)) = device_of(&name) else {
            continue;
        };
        if !is_there(domid, key)? {
            match ask(&Request::Remove(name.clone())).map_err(anyhow::Error::from) {
                Ok(_) => tracing::info!("{name} is removed: its device is gone"),
                Err(error) => tracing::warn!("{name} is not removed: {error:#}"),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(in crate::devices::net) fn ending(interface: &str) -> Ending {
        Ending::begin(interface)
    }

    fn key(form: EntryForm) -> EntryKey {
        EntryKey { form, devid: 12 }
    }

    #[test]
    fn an_interface_is_known_by_its_name() {
        assert_eq!(name(65_535, key(EntryForm::File)), "viof65535.12");
        assert_eq!(name(65_535, key(EntryForm::Attached)), "vioa65535.12");
        for form in [EntryForm::File, EntryForm::Attached, EntryForm::Virtio] {
            let made = name(65_535, key(form));
            assert_eq!(device_of(&made), Some((65_535, key(form))));
        }
        for other in [
            "vif3.0",
            "vio3",
            "vio.1",
            "viox3.0",
            "vio3.0-emu",
            "viof3.x",
        ] {
            assert_eq!(device_of(other), None, "{other}");
        }
    }

    #[test]
    fn no_device_has_an_interface_that_is_still_to_be_taken_away() {
        let made = Made {
            script: DEFAULT_SCRIPT.into(),
            bridge: None,
            ip: None,
            several_queues: false,
        };
        let interface = MadeInterface::new(&made, 9, key(EntryForm::Attached));
        let waits = interface.is_to_end();
        let busy = check_ending("vioa9.12").unwrap_err();
        assert!(busy.is::<Busy>(), "{busy:#}");
        drop(waits);
        check_ending("vioa9.12").unwrap();
    }

    #[test]
    fn a_script_is_told_what_xl_tells_one() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("vif-test");
        let told = folder.path().join("told");
        let text = format!(
            "#!/bin/sh\n[ -n \"$ip\" ] || exit 3\necho $1 $vif $XENBUS_PATH $type_if $bridge $ip >{}\n",
            told.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        let mut made = Made {
            script: script.clone(),
            bridge: Some("xenbr0".to_owned()),
            ip: Some("10.0.0.1".to_owned()),
            several_queues: false,
        };
        let interface = MadeInterface::new(&made, 3, key(EntryForm::Virtio));
        interface.run_script(Event::Online).unwrap();
        let expected = "online vio3.12 backend/virtio/3/12 vif xenbr0 10.0.0.1\n";
        assert_eq!(fs::read_to_string(&told).unwrap(), expected);
        // Until its script has ended, and it is gone, no device has it again.
        interface.end();
        assert!(is_ending("vio3.12"));
        drop(finish());
        assert!(!is_ending("vio3.12"));
        assert!(
            fs::read_to_string(&told)
                .unwrap()
                .starts_with("offline vio3.12 ")
        );
        made.ip = None;
        let interface = MadeInterface::new(&made, 3, key(EntryForm::Virtio));
        let error = interface
            .run_script(Event::Offline)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("backend/virtio/3/12"),
            "{error}"
        );
        fs::remove_file(script).unwrap();
        let error = format!("{:#}", interface.run_script(Event::Offline).unwrap_err());
        assert!(error.contains("starting it: No such file"), "{error}");
    }
}
