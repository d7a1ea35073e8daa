//! What a host has and lacks, as far as it can be seen without changing anything.

use super::host_findings::NODES;
use crate::config::Config;
use crate::ctl::control;
use crate::ctl::xl_config::xen_version;
use crate::supervisor::state_files;
use crate::toolstack::guest_file::{self, GuestFiles};
use crate::toolstack::libxl::EntryForm;
use crate::toolstack::xenstore::{XenStore, XenStoreError};
use flate2::read::GzDecoder;
use memchr::memmem;
use rustix::fs::statvfs;
use rustix::net::sockopt::socket_peercred;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use xen_virtio_backend::try_ring;
use xen_virtio_transport::xen::ioreq_servers_exist;

/// The file of a kernel's options, as far as it is read.
const MAX_OPTIONS: u64 = 4 << 20;
/// A program of xl's, as far as it is read.
const MAX_PROGRAM: u64 = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// None on a machine without Xen.
    pub(super) xen: Option<XenVersion>,
    /// Whether an ioreq server could be made for a guest, or why that cannot be told.
    pub(super) ioreq_servers: Result<bool, String>,
    /// The kernel's doors to Xen, and what became of opening them.
    pub(super) nodes: BTreeMap<&'static str, Node>,
    pub(super) kernel: Kernel,
    /// What there is of guests that are no more, or why that cannot be told.
    pub(super) xenstore: Result<Leftovers, String>,
    pub(super) xl: Option<Xl>,
    pub(super) service: Service,
    /// What keeps a file of the configuration from being used.
    pub(super) configuration: Vec<String>,
    /// Files among those of guests that are none.
    pub(super) strangers: Vec<String>,
    /// Files of the configuration that others than root may write.
    pub(super) open_files: Vec<OpenFile>,
    /// Bytes that are free where the state of guests is kept.
    pub(super) state_room: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct XenVersion {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) patch: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Opens,
    Missing,
    Refused(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) release: String,
    /// Bytes.
    pub(super) page_size: usize,
    /// Its options that are built in or modules, without CONFIG_. None if it does not tell.
    pub(super) options: Option<BTreeSet<String>>,
    pub(super) has_seccomp: bool,
    pub(super) has_network_namespaces: bool,
    /// Whether a ring can be made, or why not.
    pub(super) io_uring: Result<(), String>,
}

/// Paths of xenstore, and of files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Leftovers {
    pub(super) nodes: Vec<String>,
    pub(super) files: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Xl {
    pub(super) path: PathBuf,
    /// Of the libxl that it is linked with, if that can be told.
    pub(super) version: Option<(u32, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    /// The process that listens at the control socket, or why there is none.
    pub(super) listener: Result<u32, String>,
    pub(super) unit: Option<Unit>,
    /// What starts the process that opens network interfaces for the unit.
    pub(super) network: Option<Unit>,
}

/// What systemd says of the service: properties of systemctl(1)'s show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) load_state: String,
    pub(super) active_state: String,
    pub(super) sub_state: String,
    pub(super) file_state: String,
    pub(super) main_pid: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OpenFile {
    pub(super) path: PathBuf,
    pub(super) owner: u32,
    pub(super) mode: u32,
}

impl Host {
    /// `guests` are those that the service has: what is theirs is nothing that is left.
    pub(super) fn look(guests: &[u16]) -> Self {
        let xen = xen_version().map(|(major, minor)| XenVersion {
            major,
            minor,
            patch: patch_level(&read("/sys/hypervisor/version/extra")),
        });
        let living = Living::ask(guests);
        Self {
            ioreq_servers: ioreq_servers(),
            nodes: NODES
                .iter()
                .map(|node| (node.path, open(node.path)))
                .collect(),
            kernel: Kernel::look(),
            xenstore: living
                .map_err(|error| error.to_string())
                .and_then(|mut living| {
                    Leftovers::find(&mut living).map_err(|error| error.to_string())
                }),
            xl: Xl::find(xen),
            service: Service::look(),
            configuration: configuration(),
            strangers: GuestFiles::new(guest_file::DIRECTORY.as_ref()).strangers(),
            open_files: open_files(),
            state_room: statvfs(state_files::DIRECTORY)
                .ok()
                .map(|room| room.f_bavail.saturating_mul(room.f_frsize)),
            xen,
        }
    }
}

/// The text of a small file, without the line's end; nothing of one that is not there.
fn read(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

/// The third number of a version of Xen whose rest after the second is `extra`: `.4-pre`, say.
fn patch_level(extra: &str) -> u32 {
    let digits = extra.strip_prefix('.').unwrap_or_default();
    let end = digits.find(|c: char| !c.is_ascii_digit());
    digits[..end.unwrap_or(digits.len())].parse().unwrap_or(0)
}

fn open(path: &str) -> Node {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Node::Opens,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Node::Missing,
        Err(error) => Node::Refused(error.to_string()),
    }
}

fn ioreq_servers() -> Result<bool, String> {
    let mut options = OpenOptions::new();
    let privcmd = options.read(true).write(true).open("/dev/xen/privcmd");
    let exist = privcmd.and_then(ioreq_servers_exist);
    exist.map_err(|error| error.to_string())
}

impl Kernel {
    fn look() -> Self {
        let release = read("/proc/sys/kernel/osrelease");
        Self {
            page_size: rustix::param::page_size(),
            options: options(&release),
            has_seccomp: Path::new("/proc/sys/kernel/seccomp").exists(),
            has_network_namespaces: Path::new("/proc/self/ns/net").exists(),
            io_uring: io_uring(),
            release,
        }
    }
}

/// Workers make their rings without privilege, which is forbidden before it is to root.
fn io_uring() -> Result<(), String> {
    let disabled = read("/proc/sys/kernel/io_uring_disabled");
    if !matches!(disabled.as_str(), "" | "0") {
        return Err(format!("kernel.io_uring_disabled is {disabled}"));
    }
    try_ring().map_err(|error| error.to_string())
}

/// The options of the running kernel.
fn options(release: &str) -> Option<BTreeSet<String>> {
    let mut text = String::new();
    let was_read = match File::open("/proc/config.gz") {
        Ok(file) => GzDecoder::new(file)
            .take(MAX_OPTIONS)
            .read_to_string(&mut text),
        Err(_) => File::open(format!("/boot/config-{release}"))
            .and_then(|file| file.take(MAX_OPTIONS).read_to_string(&mut text)),
    };
    was_read.ok().map(|_| options_in(&text))
}

/// Those of `text` that are built in or modules, without CONFIG_.
fn options_in(text: &str) -> BTreeSet<String> {
    let options = text.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
        matches!(value, "y" | "m").then(|| name.to_owned())
    });
    options.collect()
}

/// Who knows which guests there are.
struct Living<'a> {
    store: XenStore,
    /// Those that the service has.
    served: &'a [u16],
}

impl<'a> Living<'a> {
    fn ask(served: &'a [u16]) -> Result<Self, XenStoreError> {
        let store = XenStore::connect()?;
        Ok(Self { store, served })
    }

    /// Whether there is a guest of this domid.
    fn has(&mut self, domid: u16) -> Result<bool, XenStoreError> {
        Ok(self.served.contains(&domid) || self.store.is_introduced(domid)?)
    }
}

impl Leftovers {
    fn find(living: &mut Living<'_>) -> Result<Self, XenStoreError> {
        let mut leftovers = Self::default();
        for form in EntryForm::ALL {
            let directory = format!("/local/domain/0/backend/{}", form.directory());
            for name in living.store.directory(&directory)? {
                let path = format!("{directory}/{name}");
                let lives = match name.parse() {
                    Ok(domid) => living.has(domid)?,
                    Err(_) => false,
                };
                // An empty one is what libxl leaves of every guest.
                if !lives && !living.store.directory(&path)?.is_empty() {
                    leftovers.nodes.push(path);
                }
            }
        }
        let state = Path::new(state_files::DIRECTORY).join("state");
        for file in fs::read_dir(state).into_iter().flatten().flatten() {
            let name = file.file_name();
            let domid = name.to_str().and_then(|name| name.split_once('-'));
            if let Some(domid) = domid.and_then(|(domid, _)| domid.parse().ok())
                && !living.has(domid)?
            {
                leftovers.files.push(file.path());
            }
        }
        Ok(leftovers)
    }
}

impl Xl {
    /// The one that a shell finds, with the libxl of `xen` where a distribution has several.
    fn find(xen: Option<XenVersion>) -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        let mut found = std::env::split_paths(&path).map(|directory| directory.join("xl"));
        let path = found.find(|path| path.is_file())?;
        // Debian's is a script, which starts that of the hypervisor's version.
        let debians = xen.map(|xen| format!("/usr/lib/xen-{}.{}/bin/xl", xen.major, xen.minor));
        let programs = [Some(path.clone()), debians.map(PathBuf::from)];
        let version = programs
            .iter()
            .flatten()
            .find_map(|program| libxl_version(program));
        Some(Self { path, version })
    }
}

/// The version of the libxl that the program at `path` names, as programs name their libraries.
fn libxl_version(path: &Path) -> Option<(u32, u32)> {
    const NAME: &[u8] = b"libxenlight.so.";
    let mut bytes = Vec::new();
    let program = File::open(path).ok()?;
    program.take(MAX_PROGRAM).read_to_end(&mut bytes).ok()?;
    let place = memmem::find(&bytes, NAME)?;
    let rest = &bytes[place + NAME.len()..];
    let end = rest.iter().position(|byte| *byte == 0)?;
    let mut numbers = std::str::from_utf8(&rest[..end]).ok()?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Service {
    fn look() -> Self {
        let listener = UnixStream::connect(control::SOCKET_PATH);
        let listener = listener.and_then(|socket| Ok(socket_peercred(&socket)?));
        Self {
            listener: listener
                .map(|peer| peer.pid.as_raw_nonzero().get().unsigned_abs())
                .map_err(|error| error.to_string()),
            unit: Unit::ask("xen-virtiod.service"),
            network: Unit::ask("xen-virtio-network.socket"),
        }
    }
}

impl Unit {
    /// None where systemd does not run.
    fn ask(name: &str) -> Option<Self> {
        if !Path::new("/run/systemd/system").exists() {
            return None;
        }
        let mut systemctl = Command::new("systemctl");
        systemctl.args(["show", name]);
        systemctl.arg("--property=LoadState,ActiveState,SubState,UnitFileState,MainPID");
        let output = systemctl.output().ok()?;
        Some(Self::read(&String::from_utf8_lossy(&output.stdout)))
    }

    fn read(text: &str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let properties: BTreeMap<_, _> = lines.collect();
        let text = |name| properties.get(name).copied().unwrap_or_default().to_owned();
        Self {
            load_state: text("LoadState"),
            active_state: text("ActiveState"),
            sub_state: text("SubState"),
            file_state: text("UnitFileState"),
            main_pid: text("MainPID").parse().unwrap_or(0),
        }
    }
}

/// What is wrong with the service's configuration and with the files of guests.
fn configuration() -> Vec<String> {
    let mut wrong = Vec::new();
    if let Err(error) = Config::load_default() {
        wrong.push(format!("{:#}", anyhow::Error::from(error)));
    }
    let files = GuestFiles::new(guest_file::DIRECTORY.as_ref());
    for name in files.names() {
        if let Err(error) = files.devices(&name) {
            wrong.push(format!("{:#}", anyhow::Error::from(error)));
        }
    }
    wrong
}

/// What of the configuration others than root may change.
fn open_files() -> Vec<OpenFile> {
    let config = Path::new(crate::config::CONFIG_PATH);
    let guests = Path::new(guest_file::DIRECTORY);
    let mut paths: Vec<PathBuf> = vec![config.to_owned(), guests.to_owned()];
    paths.extend(config.parent().map(Path::to_owned));
    let files = fs::read_dir(guests).into_iter().flatten().flatten();
    let files = files.map(|file| file.path());
    paths.extend(files.filter(|path| path.extension() == Some(OsStr::new("toml"))));
    let open = paths.into_iter().filter_map(|path| {
        let status = fs::metadata(&path).ok()?;
        let (owner, mode) = (status.uid(), status.mode() & 0o7777);
        let writers = if status.gid() == 0 { 0o002 } else { 0o022 };
        let is_open = owner != 0 || mode & writers != 0;
        is_open.then_some(OpenFile { path, owner, mode })
    });
    open.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn versions_are_read_with_what_distributions_add() {
        for (extra, patch) in [
            (".4", 4),
            (".5-pre", 5),
            ("-rc", 0),
            ("", 0),
            (".12+deb", 12),
        ] {
            assert_eq!(patch_level(extra), patch, "{extra}");
        }
    }

    #[test]
    fn options_are_those_that_are_there() {
        let text =
            "# CONFIG_A is not set\nCONFIG_XEN_GNTDEV=y\nCONFIG_B=m\nCONFIG_C=\"x\"\nCONFIG_D=n\n";
        let options: Vec<_> = options_in(text).into_iter().collect();
        assert_eq!(options, ["B", "XEN_GNTDEV"]);
    }

    #[test]
    fn a_program_names_its_libxl() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(libxl_version(file.path()), None);
        file.write_all(b"\x7fELF..libc.so.6\0libxenlight.so.4.17\0libxlutil.so.4.17\0")
            .unwrap();
        assert_eq!(libxl_version(file.path()), Some((4, 17)));
        fs::write(file.path(), b"..libxenlight.so.4.20.0\0").unwrap();
        assert_eq!(libxl_version(file.path()), Some((4, 20)));
    }

    #[test]
    fn a_unit_is_what_systemctl_says() {
        let said = "MainPID=7\nLoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\n";
        let unit = Unit::read(said);
        assert_eq!(unit.main_pid, 7);
        assert_eq!(unit.load_state, "loaded");
        assert_eq!(unit.file_state, "enabled");
        assert_eq!(Unit::read(""), Unit::default());
    }
}
