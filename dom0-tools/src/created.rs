//! What `xen-virtioctl create` says of a guest's devices, for which xl has no words: by the guest's name, and the number of
//! the device among its `virtio = [ … ]`.
//!
//! A file a guest, until another guest of that name is created or dom0 restarts: a guest that reboots finds it again.

use crate::config::VirtioConfig;
use serde::Deserialize;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the files are: the guest's name, and `.json`.
pub const DIRECTORY: &str = "/run/xen-virtiod/created";

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CreatedError {
    #[error("{} cannot be read", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} cannot be written", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is no file of xen-virtioctl create", .path.display())]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{name:?} is no name for a guest that has xen_virtio = [ … ]")]
    Name { name: String },
}

/// The files.
#[derive(Clone, Debug)]
pub struct Created {
    directory: PathBuf,
}

impl Created {
    /// Those in `directory`, which need not be there.
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, CreatedError> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            let name = name.to_owned();
            return Err(CreatedError::Name { name });
        }
        Ok(self.directory.join(format!("{name}.json")))
    }

    /// What was said of the device number `index` of guest `name`, if anything was.
    ///
    /// # Errors
    ///
    /// [`CreatedError`], which names the file.
    pub fn settings(&self, name: &str, index: u32) -> Result<Option<toml::Table>, CreatedError> {
        let Ok(path) = self.path(name) else {
            return Ok(None);
        };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CreatedError::Read { path, source }),
        };
        let devices = serde_json::from_slice::<Vec<Device>>(&text);
        let devices = devices.map_err(|source| CreatedError::Parse { path, source })?;
        let found = devices.into_iter().find(|device| device.index == index);
        Ok(found.map(|device| device.settings))
    }

    /// Says `devices` of guest `name`, in place of what was said before.
    ///
    /// # Errors
    ///
    /// [`CreatedError`], with nothing changed.
    pub fn say(&self, name: &str, devices: &[VirtioConfig]) -> Result<(), CreatedError> {
        let path = self.path(name)?;
        let devices: Vec<_> = devices
            .iter()
            .map(|device| serde_json::json!({ "index": device.index, "settings": device.settings }))
            .collect();
        let text = serde_json::to_vec(&devices).expect("tables without binary keys");
        let new = path.with_extension("new");
        let written = fs::create_dir_all(&self.directory)
            .and_then(|()| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, &path));
        written.map_err(|source| CreatedError::Write { path, source })
    }
}

#[derive(Deserialize)]
struct Device {
    index: u32,
    settings: toml::Table,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_last_holds() {
        let directory = tempfile::tempdir().unwrap();
        let created = Created::new(&directory.path().join("created"));
        assert_eq!(created.settings("g", 0).unwrap(), None);
        let device = |index, tag: &str| VirtioConfig {
            guest: "g".to_owned(),
            index,
            settings: [("tag".to_owned(), toml::Value::from(tag))]
                .into_iter()
                .collect(),
        };
        created
            .say("g", &[device(0, "one"), device(2, "two")])
            .unwrap();
        let tag = |index| {
            let settings = created.settings("g", index).unwrap();
            settings.map(|settings| settings["tag"].as_str().unwrap().to_owned())
        };
        assert_eq!(tag(2).as_deref(), Some("two"));
        assert_eq!(tag(1), None);
        created.say("g", &[device(0, "other")]).unwrap();
        assert_eq!((tag(0).as_deref(), tag(2)), (Some("other"), None));
        assert!(created.say("../g", &[]).is_err());
        assert_eq!(created.settings("../g", 0).unwrap(), None);
    }
}
