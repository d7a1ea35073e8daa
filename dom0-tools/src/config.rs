//! `/etc/xen-virtiod/config.toml`: what an xl file cannot say.

use crate::devices::rate::Rate;
use crate::devices::{self, DeviceKind, Service};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where the configuration is read from, if it is there.
pub const CONFIG_PATH: &str = "/etc/xen-virtiod/config.toml";

/// The configuration; empty without a file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What the guests' `virtio = [ … ]` devices are made of.
    #[serde(default, rename = "virtio")]
    pub devices: Vec<VirtioConfig>,
    /// What holds for single disks, whoever uses them.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
    #[serde(default)]
    pub polling: PollingConfig,
    #[serde(default)]
    pub limits: LimitsConfig,
}

/// One disk, by its path.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// The file or block device, by any of its names.
    pub path: PathBuf,
    /// Several guests, or dom0 too, use it on purpose, and agree about it among themselves (a cluster's file system).
    #[serde(default)]
    pub shared: bool,
    /// What a guest discards, or zeroes, takes no room any more. A file that has all of its room reserved is to keep it.
    #[serde(default = "yes")]
    pub discard: bool,
    /// What each of its guests may read and write in a second.
    pub bytes_per_second: Option<NonZeroU64>,
    pub requests_per_second: Option<NonZeroU64>,
    /// What a guest may have at once after a rest: as much as in so many seconds.
    #[serde(default)]
    pub burst_seconds: u32,
}

fn yes() -> bool {
    true
}

/// What one guest may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitsConfig {
    /// Percent of one of dom0's processors that the guest's worker may use, from 1; 100 is no limit.
    pub cpu_percent: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { cpu_percent: 100 }
    }
}

/// How long a worker looks for work before it sleeps, see [`polling`](crate::worker::polling).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PollingConfig {
    /// Microseconds at most; 0 turns it off.
    pub limit_us: u64,
}

impl Default for PollingConfig {
    fn default() -> Self {
        Self { limit_us: 1000 }
    }
}

/// One device of an xl file's `virtio = [ … ]`, which has no place for a path.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct VirtioConfig {
    /// The guest's name in its xl file.
    pub guest: String,
    /// Which of the guest's `virtio = [ … ]`, counted from 0.
    pub index: u32,
    /// What a device of its kind is made of.
    #[serde(flatten)]
    pub settings: toml::Table,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{} cannot be read", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a configuration of xen-virtiod: {error}", .path.display())]
    Parse {
        path: PathBuf,
        error: toml::de::Error,
    },
    #[error("{}: device {index} of guest {guest:?} is configured twice; remove one [[virtio]]", .path.display())]
    Twice {
        path: PathBuf,
        guest: String,
        index: u32,
    },
    #[error(
        "{}: [[virtio]] of guest {guest:?}, index {index} is for no kind of device: {problems}", .path.display()
    )]
    Device {
        path: PathBuf,
        guest: String,
        index: u32,
        problems: String,
    },
    #[error("{}: path = {device:?} is no absolute path", .path.display())]
    DevicePath { path: PathBuf, device: PathBuf },
    #[error(
        "{}: polling.limit-us = {limit_us} is more than {MAX_LIMIT_US}: a worker would hardly ever sleep",
        .path.display()
    )]
    PollingLimit { path: PathBuf, limit_us: u64 },
    #[error("{}: limits.cpu-percent = {percent} is not between 1 and 100", .path.display())]
    CpuPercent { path: PathBuf, percent: u32 },
}

/// The longest time that a worker may be told to look for work.
const MAX_LIMIT_US: u64 = 100_000;

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// The configuration that `text`, of the file at `path`, is.
    ///
    /// # Errors
    ///
    /// As for [`Config::load`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            error,
        })?;
        config.validate(path)?;
        Ok(config)
    }

    /// Reads [`CONFIG_PATH`]; without that file, everything is as by default.
    ///
    /// # Errors
    ///
    /// As for [`Config::load`].
    pub fn load_default() -> Result<Self, ConfigError> {
        match Self::load(CONFIG_PATH.as_ref()) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            other => other,
        }
    }

    fn validate(&self, path: &Path) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        let mut devices = self.devices.iter();
        if let Some(twice) = devices.find(|device| !seen.insert((&device.guest, device.index))) {
            return Err(ConfigError::Twice {
                path: path.into(),
                guest: twice.guest.clone(),
                index: twice.index,
            });
        }
        for VirtioConfig {
            guest,
            index,
            settings,
        } in &self.devices
        {
            let mut problems = Vec::new();
            let is_for = |kind: &dyn DeviceKind| {
                let checked = kind.check_settings(settings);
                let problem = checked.map_err(|error| format!("{}: {error:#}", kind.name()));
                problem.map_err(|problem| problems.push(problem)).is_ok()
            };
            if !devices::kinds(Service::of(settings)).any(is_for) {
                return Err(ConfigError::Device {
                    path: path.into(),
                    guest: guest.clone(),
                    index: *index,
                    problems: problems.join("; "),
                });
            }
        }
        let mut paths = self.disks.iter().map(|disk| &disk.path);
        if let Some(relative) = paths.find(|path| !path.is_absolute()) {
            return Err(ConfigError::DevicePath {
                path: path.into(),
                device: relative.clone(),
            });
        }
        let limit_us = self.polling.limit_us;
        if limit_us > MAX_LIMIT_US {
            return Err(ConfigError::PollingLimit {
                path: path.into(),
                limit_us,
            });
        }
        let percent = self.limits.cpu_percent;
        if !(1..=100).contains(&percent) {
            return Err(ConfigError::CpuPercent {
                path: path.into(),
                percent,
            });
        }
        Ok(())
    }

    /// Whether the disk at `path` has several users on purpose.
    pub fn is_shared(&self, path: &Path) -> bool {
        self.entries_of(path).any(|disk| disk.shared)
    }

    /// Whether a guest may give back what it does not need of the disk at `path`.
    pub fn may_discard(&self, path: &Path) -> bool {
        self.entries_of(path).all(|disk| disk.discard)
    }

    /// What a guest may do with the disk at `path`: the first entry for it says so.
    pub(crate) fn disk_rate(&self, path: &Path) -> Rate {
        let entry = self.entries_of(path).next();
        entry.map_or_else(Rate::default, |disk| Rate {
            bytes: disk.bytes_per_second,
            operations: disk.requests_per_second,
            burst_seconds: disk.burst_seconds,
        })
    }

    fn entries_of<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a DiskConfig> {
        let disks = self.disks.iter();
        disks.filter(move |disk| disk.path == path || is_same(&disk.path, path).unwrap_or(false))
    }

    pub fn device(&self, guest: &str, index: u32) -> Option<&VirtioConfig> {
        self.devices
            .iter()
            .find(|device| device.guest == guest && device.index == index)
    }
}

/// Whether both paths lead to one file, or to one block device.
fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (std::fs::metadata(one)?, std::fs::metadata(other)?);
    let is_block = |data: &std::fs::Metadata| data.file_type().is_block_device();
    Ok(match (is_block(&one), is_block(&other)) {
        (true, true) => one.rdev() == other.rdev(),
        (false, false) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn a_device_is_found_by_guest_and_index() {
        let config =
            load("[[virtio]]\nguest = \"ivi\"\nindex = 1\npath = \"/dev/vg/ivi\"\n").unwrap();
        let settings = &config.device("ivi", 1).unwrap().settings;
        assert_eq!(settings["path"].as_str(), Some("/dev/vg/ivi"));
        assert_eq!(config.device("ivi", 0), None);
        assert_eq!(config.device("other", 1), None);
    }

    #[test]
    fn a_disk_is_shared_by_any_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let [image, link, hard] = ["a.img", "link", "hard"].map(|name| directory.path().join(name));
        std::fs::write(&image, "").unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        std::fs::hard_link(&image, &hard).unwrap();
        let config = load(&format!(
            "[[disk]]\npath = {link:?}\nshared = true\ndiscard = false\nrequests-per-second = 100\nburst-seconds = 2\n\
             [[disk]]\npath = \"/b\"\n"
        ));
        let config = config.unwrap();
        assert!(
            [&image, &link, &hard]
                .into_iter()
                .all(|path| config.is_shared(path))
        );
        assert!(!config.is_shared(Path::new("/b")) && !config.is_shared(Path::new("/c")));
        assert!(!config.may_discard(&link));
        let rate = Rate {
            bytes: None,
            operations: NonZeroU64::new(100),
            burst_seconds: 2,
        };
        assert_eq!(config.disk_rate(&hard), rate);
        assert_eq!(config.disk_rate(Path::new("/c")), Rate::default());
        assert!(config.may_discard(Path::new("/b")) && config.may_discard(Path::new("/c")));
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let error = Config::load(Path::new("/nonexistent/config.toml")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/config.toml"),
            "{error}"
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let device = "[[virtio]]\nguest = \"ivi\"\nindex = 1\npath = \"/a\"\n";
        let error = load(&device.repeat(2)).unwrap_err().to_string();
        assert!(error.contains("device 1 of guest \"ivi\""), "{error}");
        let error = load(&device.replace("/a", "a.img")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("path = \"a.img\" is no absolute path"),
            "{error}"
        );
        let error = load("[[disk]]\npath = \"a.img\"\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("path = \"a.img\""), "{error}");
        let error = load("[polling]\nlimit-us = 100001\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("limit-us = 100001"), "{error}");
        for percent in [0, 101] {
            let error = load(&format!("[limits]\ncpu-percent = {percent}\n"))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("cpu-percent = {percent}")),
                "{error}"
            );
        }
        let empty = load("[limits]\n[polling]\n").unwrap();
        assert_eq!(empty, Config::default());
    }

    #[test]
    fn polling_is_on_unless_it_is_turned_off() {
        assert!(Config::default().polling.limit_us > 0);
        assert_eq!(
            load("[polling]\nlimit-us = 0\n").unwrap().polling.limit_us,
            0
        );
    }

    #[test]
    fn a_mistake_is_named_with_its_file_and_line() {
        for text in [
            "[[virtio]]\nguest = 1\n",
            "[[disc]]\n",
            "virtio = 3",
            "[[virtio]\n",
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(
                error.contains("line 1") || error.contains("line 2"),
                "{error}"
            );
        }
    }

    /// The page's example has every key; the types forbid those that they do not know.
    #[test]
    fn the_page_on_configuration_is_one_that_the_service_takes() {
        let page = include_str!("../../docs/configuration.md");
        let section = page.split("## In config.toml").nth(1).unwrap();
        let section = section.split("\n## ").next().unwrap();
        let example = section.lines().filter_map(|line| line.strip_prefix("    "));
        let example: Vec<_> = example.collect();
        let config = Config::parse(Path::new("configuration.md"), &example.join("\n")).unwrap();
        assert_eq!(config.polling, PollingConfig::default());
        assert_eq!(config.limits, LimitsConfig::default());
        assert!(config.disks[0].shared);
        assert_eq!(config.devices.len(), 2);
    }
}
