//! What is said of a disk: by whoever configures it, to the worker that serves it, and to the next service.

use crate::devices::rate::Rate;
use crate::devices::vhost_user::image::RAW;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use xen_virtio_backend::blk::{Serial, Topology};

/// Bytes of a serial number (virtio 1.3, 5.2.6).
const SERIAL: usize = size_of::<Serial>();

/// What a `[[virtio]]` says of one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Settings {
    /// The raw file or block device that is the disk.
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Raw: another one has somebody else serve it.
    #[serde(default)]
    pub(crate) format: Option<String>,
    /// By which the guest tells it from others: `/dev/disk/by-id/virtio-…`.
    #[serde(default)]
    pub(crate) serial: Option<String>,
}

impl Settings {
    pub(super) fn check(self) -> Result<Self> {
        ensure!(
            self.path.is_absolute(),
            "path = {:?} is no absolute path",
            self.path
        );
        let is_raw = self.format.as_deref().is_none_or(|format| format == RAW);
        ensure!(is_raw, "format = {:?} is not {RAW}", self.format);
        if let Some(serial) = &self.serial {
            let is_serial = serial.bytes().all(|byte| byte.is_ascii_graphic());
            ensure!(
                is_serial && (1..=SERIAL).contains(&serial.len()),
                "serial = {serial:?} is not 1 to {SERIAL} letters, digits and signs"
            );
        }
        Ok(self)
    }
}

/// What its guest has had of a disk, and keeps as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Binding {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    pub(super) bytes: u64,
    /// Whether it takes discards, and zeroes, which an earlier version did not know.
    #[serde(default)]
    pub(super) discards: bool,
    #[serde(default)]
    pub(super) zeroes: bool,
    #[serde(default)]
    pub(super) topology: Option<Sizes>,
    /// Nothing, if nobody has named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) serial: Option<String>,
}

/// [`Topology`], as one part of the service hands it to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sizes {
    pub(super) physical_block: u32,
    pub(super) least: u32,
    pub(super) best: u32,
}

impl From<Topology> for Sizes {
    fn from(topology: Topology) -> Self {
        let Topology {
            physical_block,
            least,
            best,
        } = topology;
        Self {
            physical_block,
            least,
            best,
        }
    }
}

impl From<Sizes> for Topology {
    fn from(sizes: Sizes) -> Self {
        let Sizes {
            physical_block,
            least,
            best,
        } = sizes;
        Self {
            physical_block,
            least,
            best,
        }
    }
}

/// What a worker is told of a disk, whose file goes beside.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Spec {
    pub(super) read_only: bool,
    /// The size that its guest is to see.
    pub(super) bytes: u64,
    pub(super) discards: bool,
    pub(super) zeroes: bool,
    pub(super) topology: Option<Sizes>,
    pub(super) rate: Rate,
    /// dom0's page cache, which it goes through, is to keep nothing of it.
    pub(super) passes_cache: bool,
    /// It has other users, by the configuration.
    pub(super) shared: bool,
    pub(super) serial: String,
    /// Names the device of the guest, also after a reboot.
    pub(super) lock: u64,
}
