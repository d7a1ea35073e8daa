//! What the configuration says of a device.

use super::{TAG_BYTES, VhostUserKind, image};
use crate::connections::connect_to;
use crate::devices::{Busy, Wanted};
use crate::program::{Exec, Program, SOCKET_WORD, check_user, user_named};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// KiB of memory that are shared with a back-end at most.
const MAX_POOL_KIB: u32 = 64 << 10;

/// Bytes of memory that are shared with a back-end at most: the pool, and the rings before it.
pub(crate) const MAX_SHARED: u64 = (MAX_POOL_KIB as u64 + (2 << 10)) << 10;

/// What a device is made of, which its guest keeps as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", rename_all = "kebab-case")]
pub(super) struct Settings {
    /// Where the back-end listens.
    pub(super) socket: PathBuf,
    /// What is started to listen there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) exec: Option<Exec>,
    /// … and whom it runs as: a name, or a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<String>,
    pub(super) pool_kib: Option<u32>,
    pub(super) queue_size: Option<u16>,
    /// A file system's name in its guest.
    pub(super) tag: Option<String>,
    /// A network device's address.
    pub(super) mac: Option<String>,
    /// … and the largest packet that it takes.
    pub(super) mtu: Option<u16>,
}

/// [`Settings`] as they are written: an image's format stands for a socket and a program.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    socket: Option<PathBuf>,
    exec: Option<Exec>,
    #[serde(default, deserialize_with = "text_or_number")]
    user: Option<String>,
    pool_kib: Option<u32>,
    queue_size: Option<u16>,
    tag: Option<String>,
    mac: Option<String>,
    mtu: Option<u16>,
    format: Option<String>,
    path: Option<PathBuf>,
    read_only: Option<bool>,
}

impl TryFrom<Written> for Settings {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let (socket, exec) = match (written.socket, written.format) {
            (Some(socket), None) => match written.path.is_some() || written.read_only.is_some() {
                true => {
                    return Err(
                        "path and read-only are for who listens at the socket to know".into(),
                    );
                }
                false => (socket, written.exec),
            },
            (Some(_), Some(_)) => return Err("format = brings a socket of its own".into()),
            (None, None) => return Err("missing field `socket`".into()),
            (None, Some(_)) if written.exec.is_some() => {
                return Err("format = brings a program of its own".into());
            }
            (None, Some(_)) if written.user.is_none() => {
                return Err(
                    "format = needs user = whom qemu-storage-daemon runs as, who can use the image"
                        .into(),
                );
            }
            (None, Some(format)) => {
                let path = written.path.ok_or("missing field `path`")?;
                let served = image::served(&format, &path, written.read_only.unwrap_or(false));
                let (socket, exec) = served?;
                (socket, Some(exec))
            }
        };
        Ok(Self {
            socket,
            exec,
            user: written.user,
            pool_kib: written.pool_kib,
            queue_size: written.queue_size,
            tag: written.tag,
            mac: written.mac,
            mtu: written.mtu,
        })
    }
}

impl Settings {
    pub(super) fn check(self, kind: &VhostUserKind) -> Result<Self> {
        let plain: PathBuf = self.socket.components().collect();
        ensure!(
            self.socket.is_absolute() && plain.as_os_str() == self.socket.as_os_str(),
            "socket = {:?} is no absolute path in its plain form",
            self.socket
        );
        match (&self.exec, &self.user) {
            (Some(exec), Some(user)) => {
                exec.words(&self.socket)?;
                check_user(user)?;
            }
            (Some(_), None) => bail!("exec = needs user = whom the program runs as"),
            (None, Some(_)) => {
                bail!("user = says whom the program of exec = runs as, which is not there")
            }
            (None, None) => {}
        }
        let pool = self.pool_kib(kind);
        ensure!(
            (64..=MAX_POOL_KIB).contains(&pool),
            "pool-kib = {pool} is not from 64 to {MAX_POOL_KIB}"
        );
        let (size, most) = (self.queue_size(kind), kind.class.queue_size);
        ensure!(
            size.is_power_of_two() && size <= most,
            "queue-size = {size} is no power of two up to {most}"
        );
        let (is_fs, is_net) = (kind.name == "fs", kind.name == "net");
        for (key, is_there, has_place) in [
            ("tag", self.tag.is_some(), is_fs),
            ("mac", self.mac.is_some(), is_net),
            ("mtu", self.mtu.is_some(), is_net),
        ] {
            ensure!(
                !is_there || has_place,
                "a device of type {} has no {key}",
                kind.name
            );
        }
        if let Some(tag) = &self.tag {
            ensure!(
                (1..=TAG_BYTES).contains(&tag.len()),
                "tag = {tag:?} has not from 1 to {TAG_BYTES} bytes"
            );
        }
        if let Some(mac) = &self.mac {
            parse_mac(mac)?;
        }
        Ok(self)
    }

    /// What is to be kept running for the device.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn program(&self, wanted: &Wanted<'_>) -> Result<Option<Program>> {
        let (Some(exec), Some(user)) = (&self.exec, &self.user) else {
            return Ok(None);
        };
        user_named(user)?;
        let words = exec.words(&self.socket)?;
        let guest = (wanted.guest, wanted.name);
        Ok(Some(Program::new(
            guest,
            wanted.key,
            &self.socket,
            user,
            words,
        )))
    }

    /// What its program will fail of, as dom0 is now.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(Err(error)) = self.user.as_deref().map(user_named) {
            warnings.push(format!("{error:#}"));
        }
        if let Some(exec) = &self.exec
            && let Ok(words) = exec.words(&self.socket)
        {
            if !Path::new(&words[0]).exists() {
                warnings.push(format!("exec = there is no {}", words[0]));
            }
            if exec.words(Path::new("")).is_ok_and(|other| other == words) {
                let socket = self.socket.display();
                warnings.push(format!(
                    "exec = does not say {SOCKET_WORD}: does the program listen at {socket}?"
                ));
            }
        }
        warnings
    }

    /// Connects to the back-end; nothing, if none is there and the device `may_wait` for it. It `has_program`, if we have started
    /// one.
    ///
    /// # Errors
    ///
    /// [`Busy`] if there is none.
    pub(super) fn connect(&self, has_program: bool, may_wait: bool) -> Result<Option<OwnedFd>> {
        match connect_to(&self.socket) {
            Ok(socket) => Ok(Some(socket)),
            // What the guest has had, or had before it was restarted, waits for it.
            Err(_) if may_wait => Ok(None),
            Err(error) => {
                let socket = self.socket.display();
                let what = match has_program {
                    true => "the log says what becomes of its program",
                    false => "start it",
                };
                let why = format!("no back-end is at {socket} yet ({error}): {what}");
                Err(Busy(why).into())
            }
        }
    }

    pub(super) fn pool_kib(&self, kind: &VhostUserKind) -> u32 {
        self.pool_kib.unwrap_or(kind.pool_kib)
    }

    pub(super) fn queue_size(&self, kind: &VhostUserKind) -> u16 {
        self.queue_size.unwrap_or(kind.class.queue_size)
    }
}

fn text_or_number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Number(u32),
    }
    let either = Option::<Either>::deserialize(from)?;
    Ok(either.map(|either| match either {
        Either::Text(text) => text,
        Either::Number(number) => number.to_string(),
    }))
}

/// Six bytes, as `00:16:3e:00:00:01`.
pub(in super::super) fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes = text.split(':').map(|byte| match byte.len() {
        2 => u8::from_str_radix(byte, 16).ok(),
        _ => None,
    });
    let bytes: Option<Vec<u8>> = bytes.collect();
    let mac = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    let mac = mac.with_context(|| format!("mac = {text:?} is not like 00:16:3e:00:00:01"))?;
    ensure!(mac[0] & 1 == 0, "mac = {text:?} is a group's address");
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::super::KINDS;
    use super::*;
    use crate::devices::DeviceKind;
    use xen_virtio_backend::shadow::Region;
    use xen_virtio_backend::vhost_user::MAX_QUEUES;

    fn check(name: &str, settings: &str) -> Result<()> {
        let kind = KINDS.iter().find(|kind| kind.name == name).unwrap();
        kind.check_settings(&settings.parse::<toml::Table>().unwrap())
    }

    #[test]
    fn the_largest_pool_is_shared_with_its_rings() {
        for kind in KINDS {
            let sizes = [kind.class.queue_size; MAX_QUEUES as usize];
            let region = Region::new(&sizes, MAX_POOL_KIB as usize * 1024).unwrap();
            assert!(region.bytes() as u64 <= MAX_SHARED, "{}", kind.name);
        }
    }

    #[test]
    fn an_image_is_served_by_one_line_and_its_guest_keeps_what_that_stands_for() {
        let written =
            "format = \"qcow2\"\npath = \"/srv/a b,c.qcow2\"\nuser = 4711\nread-only = true";
        check("blk", written).unwrap();
        let settings: Settings = toml::from_str(written).unwrap();
        let words = settings.exec.as_ref().unwrap().words(&settings.socket);
        let words = words.unwrap();
        let block: serde_json::Value = serde_json::from_str(&words[2]).unwrap();
        assert_eq!(block["driver"], "qcow2");
        assert_eq!(block["file"]["filename"], "/srv/a b,c.qcow2");
        assert_eq!(block["read-only"], true);
        assert!(words[4].contains("writable=off") && words[4].contains("disk.sock"));
        // As it is kept.
        let kept = serde_json::to_value(&settings).unwrap();
        assert_eq!(serde_json::from_value::<Settings>(kept).unwrap(), settings);
        let other: Settings = toml::from_str(&written.replace("a b", "d")).unwrap();
        assert_ne!(other.socket, settings.socket);
    }

    #[test]
    fn settings_are_judged_by_their_kind() {
        let socket = "socket = \"/run/b.sock\"\n";
        for (name, more) in [
            ("fs", "tag = \"share\""),
            ("net", "mac = \"00:16:3e:00:00:01\"\nmtu = 9000"),
            ("blk", "queue-size = 128\npool-kib = 1024"),
            ("rng", "exec = \"/bin/rng\"\nuser = 4711"),
            ("i2c", "exec = \"/bin/i2c {socket}\"\nuser = \"4711\""),
        ] {
            check(name, &format!("{socket}{more}")).unwrap();
        }
        for (name, settings, wrong) in [
            ("fs", "tag = \"share\"", "socket"),
            ("fs", "socket = \"b.sock\"", "no absolute path"),
            ("blk", "socket = \"/b\"\ntag = \"share\"", "has no tag"),
            ("fs", "socket = \"/b\"\ntag = \"\"", "bytes"),
            (
                "fs",
                "socket = \"/b\"\nmac = \"00:16:3e:00:00:01\"",
                "has no mac",
            ),
            (
                "net",
                "socket = \"/b\"\nmac = \"00:16:3e:00:01\"",
                "is not like",
            ),
            (
                "net",
                "socket = \"/b\"\nmac = \"01:16:3e:00:00:01\"",
                "group",
            ),
            (
                "blk",
                "socket = \"/b\"\nqueue-size = 2048",
                "power of two up to 1024",
            ),
            ("blk", "socket = \"/b\"\nqueue-size = 100", "power of two"),
            ("blk", "socket = \"/b\"\npool-kib = 1", "pool-kib = 1"),
            (
                "fs",
                "socket = \"/b\"\nexec = \"/bin/v {socket}\"",
                "needs user",
            ),
            ("fs", "socket = \"/b\"\nuser = \"4711\"", "exec"),
            ("blk", "socket = \"/b\"\npath = \"/d\"", "path"),
            ("blk", "format = \"qcow2\"\npath = \"/d\"", "needs user"),
            ("blk", "format = \"qcow2\"\nuser = 5", "path"),
            (
                "blk",
                "format = \"vmdk\"\npath = \"/d\"\nuser = 5",
                "none of raw, qcow2",
            ),
            (
                "blk",
                "format = \"qcow2\"\npath = \"d\"\nuser = 5",
                "no absolute path",
            ),
            (
                "blk",
                "format = \"qcow2\"\nsocket = \"/b\"",
                "socket of its own",
            ),
            (
                "blk",
                "format = \"qcow2\"\npath = \"/d\"\nuser = 5\nexec = \"/b\"",
                "program of its own",
            ),
            (
                "fs",
                "format = \"qcow2\"\npath = \"/d\"\nuser = 5",
                "has no format",
            ),
        ] {
            let error = check(name, settings).unwrap_err().to_string();
            assert!(error.contains(wrong), "{settings}: {error}");
        }
    }
}
