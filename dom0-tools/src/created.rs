//! What `xen-virtioctl create` says of a guest's devices, for which xl has no words: by the guest's uuid, and the number of
//! the device among its `virtio = [ … ]`.
//!
//! A file a guest, until another guest of its name is created or dom0 restarts: a guest that reboots keeps its uuid, and one
//! that is created in another way has another.

use crate::config::VirtioConfig;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the files are: the guest's uuid, and `.json`.
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

    fn path(&self, uuid: &str) -> PathBuf {
        // Whoever writes it, it names no other folder.
        let safe = uuid.replace(|byte: char| !byte.is_ascii_hexdigit() && byte != '-', "");
        self.directory.join(format!("{safe}.json"))
    }

    /// What was said of the device number `index` of the guest, if anything was.
    ///
    /// # Errors
    ///
    /// [`CreatedError`], which names the file.
    pub fn settings(&self, uuid: &str, index: u32) -> Result<Option<toml::Table>, CreatedError> {
        let path = self.path(uuid);
        match read(&path)? {
            Some(said) => {
                let mut devices = said.devices.into_iter();
                let found = devices.find(|device| device.index == index);
                Ok(found.map(|device| device.settings))
            }
            None => Ok(None),
        }
    }

    /// Says `devices` of a guest that is to be created, in place of what was said of others of its name.
    ///
    /// # Errors
    ///
    /// [`CreatedError`].
    pub fn say(
        &self,
        uuid: &str,
        name: &str,
        devices: &[VirtioConfig],
    ) -> Result<(), CreatedError> {
        for file in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            // What cannot be read is nobody's.
            if read(&file.path()).map_or(true, |said| said.is_none_or(|said| said.name == name)) {
                let _ = fs::remove_file(file.path());
            }
        }
        let path = self.path(uuid);
        let said = Said {
            name: name.to_owned(),
            devices: devices
                .iter()
                .map(|device| Device {
                    index: device.index,
                    settings: device.settings.clone(),
                })
                .collect(),
        };
        let text = serde_json::to_vec(&said).expect("tables without binary keys");
        let new = path.with_extension("new");
        let written = fs::create_dir_all(&self.directory)
            .and_then(|()| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, &path));
        written.map_err(|source| CreatedError::Write { path, source })
    }

    /// The guest was not created.
    pub fn forget(&self, uuid: &str) {
        // The next of its name does it otherwise.
        let _ = fs::remove_file(self.path(uuid));
    }
}

fn read(path: &Path) -> Result<Option<Said>, CreatedError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            let path = path.to_owned();
            return Err(CreatedError::Read { path, source });
        }
    };
    let said = serde_json::from_slice(&text);
    let said = said.map_err(|source| CreatedError::Parse {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(said))
}

#[derive(Serialize, Deserialize)]
struct Said {
    name: String,
    devices: Vec<Device>,
}

#[derive(Serialize, Deserialize)]
struct Device {
    index: u32,
    settings: toml::Table,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_of_a_guest_is_no_other_guests() {
        let directory = tempfile::tempdir().unwrap();
        let created = Created::new(&directory.path().join("created"));
        let [one, two, three] = ["1-a", "2-b", "3-c"];
        assert_eq!(created.settings(one, 0).unwrap(), None);
        let device = |index, tag: &str| VirtioConfig {
            guest: String::new(),
            index,
            settings: [("tag".to_owned(), toml::Value::from(tag))]
                .into_iter()
                .collect(),
        };
        let devices = [device(0, "one"), device(2, "two")];
        created.say(one, "g", &devices).unwrap();
        created.say(two, "h", &[device(0, "h")]).unwrap();
        let tag = |uuid, index| {
            let settings = created.settings(uuid, index).unwrap();
            settings.map(|settings| settings["tag"].as_str().unwrap().to_owned())
        };
        assert_eq!(tag(one, 2).as_deref(), Some("two"));
        assert_eq!(tag(one, 1), None);
        created.say(three, "g", &[device(0, "other")]).unwrap();
        assert_eq!(
            (tag(three, 0).as_deref(), tag(one, 0)),
            (Some("other"), None)
        );
        assert_eq!(tag(two, 0).as_deref(), Some("h"));
        created.forget(two);
        assert_eq!(tag(two, 0), None);
        assert_eq!(created.settings("../../etc/passwd", 0).unwrap(), None);
    }
}
