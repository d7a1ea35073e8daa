//! Disks: a file or block device of dom0, which has one user.

pub(crate) mod lock;
mod terms;
mod uses;

pub(crate) use uses::Uses;

use super::{
    Building, Built, Busy, Changed, Control, DeviceKind, NewDevice, Opened, Order, Resources,
    SyscallRule, Wanted, parse_settings, spec,
};
use crate::config::CONFIG_PATH;
use crate::guest_state::{self, Backing};
use crate::toolstack::libxl::{EntryForm, EntryKey, EntryKind};
use anyhow::{Context, Result, bail, ensure};
use lock::LockError;
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
pub(crate) use terms::Settings;
use terms::{Binding, Sizes, Spec};
use uses::{DeviceLock, Stores, WantedDisk};
use virtio_bindings::virtio_blk as blk;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{
    Blk, Caching, Capacity, Claim, Disk, DiskError, Erases, Serial, Topology,
};
use xen_virtio_backend::{DeviceType, StateArea};

/// Queues of a disk: one a vCPU up to this many. More than that the one thread does not gain from.
const MAX_QUEUES: usize = 4;

/// The records of a disk: what [`Blk`] keeps, and the size that the driver was told of, zero if it was told of none.
const KEPT: u16 = 0;
const TOLD: u16 = 1;
const TOLD_BYTES: usize = 8;

/// `_IO(0x12, 104)` (`linux/fs.h`): a block device's logical block size.
const BLKSSZGET: u64 = 0x1268;

/// As `xen-virtioctl` shows it.
pub(crate) const NAME: &str = "blk";

pub(super) struct BlkKind;

impl DeviceKind for BlkKind {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        &[
            (blk::VIRTIO_BLK_F_SIZE_MAX, "SIZE_MAX"),
            (blk::VIRTIO_BLK_F_SEG_MAX, "SEG_MAX"),
            (blk::VIRTIO_BLK_F_GEOMETRY, "GEOMETRY"),
            (blk::VIRTIO_BLK_F_RO, "RO"),
            (blk::VIRTIO_BLK_F_BLK_SIZE, "BLK_SIZE"),
            (blk::VIRTIO_BLK_F_FLUSH, "FLUSH"),
            (blk::VIRTIO_BLK_F_TOPOLOGY, "TOPOLOGY"),
            (blk::VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE"),
            (blk::VIRTIO_BLK_F_MQ, "MQ"),
            (blk::VIRTIO_BLK_F_DISCARD, "DISCARD"),
            (blk::VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES"),
            (blk::VIRTIO_BLK_F_SECURE_ERASE, "SECURE_ERASE"),
        ]
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some("CONFIG_VIRTIO_BLK")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        let Ok(Settings {
            path, read_only, ..
        }) = parse_settings(settings)
        else {
            return Vec::new();
        };
        let opened = Disk::open(&path, read_only);
        let problem = opened
            .err()
            .map(|error| format!("{:#}", anyhow::Error::from(error)));
        problem.into_iter().collect()
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        parse_settings::<Settings>(settings)?.check().map(drop)
    }

    fn state_bytes(&self, _spec: &Value) -> usize {
        let queues = [Blk::QUEUE_SIZE; MAX_QUEUES];
        guest_state::device_bytes(&[Blk::KEPT, TOLD_BYTES], &queues)
    }

    fn open(&self, wanted: &Wanted<'_>, uses: &mut Uses) -> Result<Opened> {
        let kept = wanted.kept.clone().map(serde_json::from_value::<Binding>);
        let bound = kept.transpose()?;
        let Configured {
            path,
            read_only,
            serial,
        } = match &bound {
            Some(bound) => Configured {
                path: bound.path.clone(),
                read_only: bound.read_only,
                serial: bound.serial.clone(),
            },
            None => configured(wanted)?,
        };
        let shared = wanted.config.is_shared(&path);
        let mut disk = open_disk(wanted, &path, read_only)?;
        let Erases { discards, zeroes } = match &bound {
            Some(bound) => {
                disk.set_bytes(bound.bytes);
                let (discards, zeroes) = (bound.discards, bound.zeroes);
                Erases { discards, zeroes }
            }
            None => {
                let Erases { discards, zeroes } = disk.can_erase();
                let discards = discards && wanted.config.may_discard(&path);
                Erases { discards, zeroes }
            }
        };
        let topology = match &bound {
            Some(bound) => bound.topology,
            None => disk.measure_topology().map(Sizes::from),
        };
        if disk.can_keep_nothing_cached() {
            disk.keep_nothing_cached();
        }
        let lock = lock::name(wanted.guest.vm.as_deref().unwrap_or_default(), wanted.key);
        let used = WantedDisk {
            guest: wanted.guest,
            name: wanted.name,
            key: wanted.key,
            path: &path,
            stores: Stores::of(disk.file())?,
            writes: !read_only,
            lock: DeviceLock {
                name: lock,
                inode: disk.file().metadata()?.ino(),
            },
        };
        if !shared {
            take_use(wanted, used, &disk, uses)?;
        }
        let opened = Opened::new(
            describe(&path, read_only, disk.caching()),
            spec(&Spec {
                read_only: disk.read_only(),
                bytes: disk.bytes(),
                discards,
                zeroes,
                topology,
                rate: wanted.config.disk_rate(&path),
                passes_cache: disk.caching() == Caching::Passing,
                shared,
                serial: serial.clone().unwrap_or_else(|| default_serial(wanted)),
                lock,
            }),
        );
        Ok(Opened {
            backing: Some(Backing::of(disk.file())?),
            kept: Some(spec(&Binding {
                path: path.clone(),
                read_only,
                bytes: disk.bytes(),
                discards,
                zeroes,
                topology,
                serial,
            })),
            descriptors: vec![OwnedFd::from(disk.into_file())],
            ..opened
        })
    }

    fn change(
        &self,
        order: Order,
        kept: Option<Value>,
        backing: Option<Backing>,
    ) -> Result<Changed> {
        ensure!(
            order == Order::Resize,
            "a device of type {} has no {}",
            self.name(),
            order.part()
        );
        let bound = kept.context("nothing is recorded of it")?;
        let bound: Binding = serde_json::from_value(bound)?;
        let after = new_size(&bound, backing)?;
        let before = bound.bytes;
        Ok(Changed {
            done: format!("{before} bytes before, {after} bytes now"),
            kept: Some(spec(&Binding {
                bytes: after,
                ..bound
            })),
            change: spec(&after),
        })
    }

    fn build(&self, new: NewDevice<'_>, resources: &Resources<'_>) -> Result<Building> {
        let spec: Spec = serde_json::from_value(new.spec)?;
        let file = new.descriptors.into_iter().next();
        let file = file.context("no descriptor came with the disk")?;
        // Without a ring a disk would hold up all of its guest.
        if resources.rings.is_empty() && resources.has_leaving {
            let why = "no io_uring is left for it while a disk that was detached hangs";
            return Err(Busy(why.to_owned()).into());
        }
        let (key, served) = (new.key, new.served);
        let mut claim: Option<Claim> = None;
        let taken = if spec.read_only {
            Ok(())
        } else {
            lock::take(&file, spec.lock)
        };
        match taken {
            Ok(()) => spec.take_image(&file, key, served).map_err(of_lock)?,
            // What the guest has had is served, and waits; all else can be refused.
            Err(LockError::Busy) if served && !resources.begun => {
                let (file, spec) = (file.try_clone()?, spec.clone());
                claim = Some(Box::new(move || {
                    lock::take(&file, spec.lock)?;
                    Ok(spec.take_image(&file, key, served)?)
                }));
            }
            Err(error) => return Err(of_lock(error)),
        }
        let mut disk = Disk::from_file(file.into(), spec.read_only)?;
        // A guest that the first version has begun with has no room for more.
        let kept = new.records.own(KEPT, Blk::KEPT);
        let kept = kept.or_else(|_| new.records.own(KEPT, Blk::KEPT_BEFORE))?;
        let told = new.records.own(TOLD, TOLD_BYTES)?;
        // The driver may have been told of another size, which it is to keep until it is told of this one.
        disk.set_bytes(match told.load(0) {
            0 => spec.bytes,
            bytes => bytes,
        });
        disk.set_erases(Erases {
            discards: spec.discards,
            zeroes: spec.zeroes,
        });
        if spec.passes_cache {
            disk.keep_nothing_cached();
        }
        disk.set_topology(spec.topology.map(Topology::from));
        let queues = u16::try_from(resources.vcpus.min(MAX_QUEUES))?;
        let serial = padded(&spec.serial);
        let mut blk = Blk::new(disk, serial, queues, kept, resources.rings)?;
        blk.limit(spec.rate.into());
        if let Some(claim) = claim {
            blk.claim_first(claim);
        }
        let control = BlkControl {
            capacity: blk.capacity(),
            told,
        };
        control.capacity.set(spec.bytes);
        Ok(Building::Ready(Built {
            device: Box::new(blk),
            control: Some(Box::new(control)),
            known: None,
        }))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        let any = [
            // The filter sees no entry of a ring. The rings that are there are restricted to a disk's transfers, and
            // without `io_uring_setup` there are no others.
            libc::SYS_io_uring_enter,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_fdatasync,
            libc::SYS_lseek,
            libc::SYS_fcntl,
            // Of a descriptor: the root is empty.
            libc::SYS_statx,
            libc::SYS_fstat,
            libc::SYS_newfstatat,
        ];
        // A ring is told of its disk and its buffer when the disk is attached, which may be at any time. The ring's
        // restrictions allow the same operations; the filter also stops those that need no ring.
        let register_ops = RingStock::REGISTER_OPS.map(u64::from).to_vec();
        let with = |call, argument| SyscallRule { call, argument };
        any.into_iter()
            .map(|call| with(call, None))
            .chain([
                with(libc::SYS_io_uring_register, Some((1, register_ops))),
                with(libc::SYS_ioctl, Some((1, vec![BLKSSZGET]))),
            ])
            .collect()
    }
}

/// What is said of a disk that a guest has not had yet.
struct Configured {
    path: PathBuf,
    read_only: bool,
    serial: Option<String>,
}

/// Where the disk is, and whether it is for reading only, as the toolstack or the configuration says.
fn configured(wanted: &Wanted<'_>) -> Result<Configured> {
    if let EntryKind::Disk {
        path, read_only, ..
    } = wanted.source
    {
        return Ok(Configured {
            path: path.clone(),
            read_only: *read_only,
            serial: None,
        });
    }
    let settings: Option<Settings> = wanted.settings()?;
    let settings = settings.with_context(|| {
        format!(
            "nothing says which disk this is: add to {CONFIG_PATH} [[virtio]] guest = {:?}, index = {}, path = \"…\", and \
             restart xen-virtiod",
            wanted.name, wanted.key.devid
        )
    })?;
    let settings = settings.check()?;
    Ok(Configured {
        path: settings.path,
        read_only: settings.read_only,
        serial: settings.serial,
    })
}

/// The serial number of a disk for which nobody has named one. No two disks of a guest have the same.
fn default_serial(wanted: &Wanted<'_>) -> String {
    match (wanted.source, wanted.key.form) {
        (EntryKind::Disk { vdev, .. }, _) => vdev.clone(),
        (_, EntryForm::Attached) => format!("attached{}", wanted.key.devid),
        _ => format!("virtio{}", wanted.key.devid),
    }
}

fn open_disk(wanted: &Wanted<'_>, path: &Path, read_only: bool) -> Result<Disk> {
    let opened = if wanted.served {
        Disk::open_again(path, read_only)
    } else {
        Disk::open(path, read_only)
    };
    opened.map_err(|error| in_use(path, error))
}

/// Has the guest use the disk, unless somebody else does and one of both writes it.
fn take_use(wanted: &Wanted<'_>, used: WantedDisk<'_>, disk: &Disk, uses: &mut Uses) -> Result<()> {
    // What a running guest has it keeps: it may be that dom0 came later.
    if !wanted.served
        && let Some(user) = used.stores.user_in_dom0(disk, used.writes)?
    {
        return Err(in_use_by(used.path, &user).into());
    }
    if let Some(user) = uses.conflict(&used) {
        let in_use = in_use_by(used.path, &user);
        if !wanted.served {
            return Err(in_use.into());
        }
        // It has been so since before this version looked.
        let (name, domid, key) = (wanted.name, wanted.guest.domid, wanted.key);
        tracing::warn!(guest = name, domid, device = %key, "{in_use}");
    }
    uses.add(used);
    Ok(())
}

/// Somebody else has the disk, who may let go of it.
fn in_use_by(path: &Path, user: &str) -> Busy {
    let path = path.display();
    Busy(format!(
        "disk {path}: is in use, and one of its users writes it: {user}; to share it on purpose, add [[disk]] path = \
         \"{path}\", shared = true to {CONFIG_PATH}, and restart xen-virtiod"
    ))
}

/// `error`, or who has the block device that Linux opens for nobody else's writing, because dom0 has it mounted
/// (CONFIG_BLK_DEV_WRITE_MOUNTED).
fn in_use(path: &Path, error: DiskError) -> anyhow::Error {
    let user = || {
        let disk = Disk::open_again(path, true).ok()?;
        Stores::of(disk.file())
            .ok()?
            .user_in_dom0(&disk, true)
            .ok()?
    };
    match &error {
        DiskError::Open { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            match user() {
                Some(user) => in_use_by(path, &user).into(),
                None => error.into(),
            }
        }
        _ => error.into(),
    }
}

fn describe(path: &Path, read_only: bool, caching: Caching) -> String {
    let how = if read_only { "read-only" } else { "read-write" };
    let cached = match caching {
        Caching::Direct => "",
        Caching::Passing => ", through dom0's page cache, which keeps nothing of it",
        Caching::Kept => ", through dom0's page cache",
    };
    format!("{}, {how}{cached}", path.display())
}

/// What a running disk can be resized to.
///
/// # Errors
///
/// Why it cannot.
fn new_size(bound: &Binding, backing: Option<Backing>) -> Result<u64> {
    let disk = Disk::open_again(&bound.path, true)?;
    let path = bound.path.display();
    if backing != Some(Backing::of(disk.file())?) {
        bail!("another file or block device is at {path} than the guest has");
    }
    let (now, told) = (disk.measure()?, bound.bytes);
    if now < told {
        bail!(
            "{path} has {now} bytes, and the guest knows {told}: a disk does not shrink under its guest"
        );
    }
    if now == told {
        bail!(
            "{path} has {now} bytes, as the guest knows: enlarge it first (truncate -s, lvextend)"
        );
    }
    Ok(now)
}

impl Spec {
    /// Tells other programs that the image is in use.
    fn take_image(&self, file: &OwnedFd, key: EntryKey, served: bool) -> Result<(), LockError> {
        if self.shared {
            return Ok(());
        }
        let taken = lock::take_image(file, !self.read_only);
        if let Err(error) = &taken
            && served
        {
            // What the guest has had it keeps: it may be that the other program came meanwhile.
            tracing::warn!(device = %key, "{error}");
            return Ok(());
        }
        taken
    }
}

fn of_lock(error: LockError) -> anyhow::Error {
    if error.is_busy() {
        Busy(error.to_string()).into()
    } else {
        error.into()
    }
}

/// The first bytes of `text`, as many as a serial number has.
fn padded(text: &str) -> Serial {
    let mut serial = Serial::default();
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

/// Changes the size of a disk.
struct BlkControl {
    capacity: Capacity,
    told: StateArea,
}

impl Control for BlkControl {
    fn change(&self, change: &Value, _descriptors: Vec<OwnedFd>) -> Result<()> {
        self.capacity.set(u64::deserialize(change)?);
        Ok(())
    }

    fn told(&self) {
        self.told.store(0, self.capacity.get());
    }
}
