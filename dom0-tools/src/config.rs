//! `/etc/xen-virtiod/config.toml`: what an xl file cannot say.

use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};

/// Where the configuration is read from, if it is there.
pub const CONFIG_PATH: &str = "/etc/xen-virtiod/config.toml";

/// The configuration; empty without a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What the guests' `virtio = [ … ]` devices are made of.
    #[serde(default, rename = "virtio")]
    pub devices: Vec<VirtioConfig>,
    #[serde(default)]
    pub polling: PollingConfig,
}

/// How long a worker looks for work before it sleeps, see [`polling`](crate::polling).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VirtioConfig {
    /// The guest's name in its xl file.
    pub guest: String,
    /// Which of the guest's `virtio = [ … ]`, counted from 0.
    pub index: u32,
    /// For `virtio,device2`: the raw file or block device that is the disk.
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
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
}

impl Config {
    /// Reads the file at `path`; without one, everything is as by default.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file and the line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|error| ConfigError::Parse {
                path: path.into(),
                error,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: path.into(),
                source,
            }),
        }
    }

    pub fn device(&self, guest: &str, index: u32) -> Option<&VirtioConfig> {
        self.devices
            .iter()
            .find(|device| device.guest == guest && device.index == index)
    }
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
        assert_eq!(
            config.device("ivi", 1).unwrap().path,
            Path::new("/dev/vg/ivi")
        );
        assert_eq!(config.device("ivi", 0), None);
        assert_eq!(config.device("other", 1), None);
    }

    #[test]
    fn no_file_is_an_empty_configuration() {
        assert_eq!(
            Config::load(Path::new("/nonexistent/config.toml")).unwrap(),
            Config::default()
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
}
