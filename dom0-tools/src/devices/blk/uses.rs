//! Who uses which disk: a disk that somebody writes has one user.
//!
//! As Xen's own block script does, a second user of a disk is refused, unless nobody writes it. What a disk is kept
//! in is told by device and inode numbers, through loop devices and partitions, and not by its path.

use super::lock::Locks;
use crate::devices::console::Consoles;
use crate::devices::input::Inputs;
use crate::devices::net::{self, MadeInterface};
use crate::toolstack::Identity;
use crate::toolstack::libxl::EntryKey;
use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use xen_virtio_backend::blk::Disk;

const SYSFS: &str = "/sys";
/// One line for each mount (proc_pid_mountinfo(5)).
const MOUNTS: &str = "/proc/self/mountinfo";

/// Something that holds bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Store {
    /// A block device, by its number.
    Device(u64),
    File {
        device: u64,
        inode: u64,
    },
}

/// What a disk's bytes are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stores {
    /// Each of them holds all of the disk's bytes.
    same: BTreeSet<Store>,
    /// The device that the disk is a partition of.
    whole: Option<Store>,
    /// Loop devices on the disk's file, by name.
    loops: Vec<String>,
}

impl Stores {
    /// Those of what is open as `file`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        Self::look(file, SYSFS.as_ref())
    }

    fn look(file: &File, sysfs: &Path) -> io::Result<Self> {
        let data = file.metadata()?;
        let mut stores = Self::default();
        if !data.file_type().is_block_device() {
            let store = file_of(&data);
            for (name, device, backing) in loop_devices(sysfs) {
                if backing == Some(store.clone()) {
                    stores.same.insert(Store::Device(device));
                    stores.loops.push(name);
                }
            }
            stores.same.insert(store);
            return Ok(stores);
        }
        let device = data.rdev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let entry = sysfs.join(format!("dev/block/{major}:{minor}"));
        stores.same.insert(Store::Device(device));
        stores.same.extend(backing_file(&entry));
        if entry.join("partition").exists() {
            stores.whole = device_number(&entry.join("../dev")).map(Store::Device);
        }
        Ok(stores)
    }

    /// Whether a byte of one may be a byte of the other.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let in_whole = |part: &Self, whole: &Self| {
            part.whole
                .as_ref()
                .is_some_and(|store| whole.same.contains(store))
        };
        !self.same.is_disjoint(&other.same) || in_whole(self, other) || in_whole(other, self)
    }

    /// Who in dom0 uses the disk already, so that a guest that is to have it as `writes` says must not.
    ///
    /// # Errors
    ///
    /// If that cannot be found out.
    pub(crate) fn user_in_dom0(&self, disk: &Disk, writes: bool) -> io::Result<Option<String>> {
        if writes && let Some(name) = self.loops.first() {
            return Ok(Some(format!(
                "it is the file of /dev/{name} (losetup -d /dev/{name})"
            )));
        }
        let mounts = fs::read_to_string(MOUNTS)?;
        if let Some((place, for_writing)) = self.mount(&mounts)
            && (writes || for_writing)
        {
            return Ok(Some(format!(
                "dom0 has it mounted at {place} (umount {place})"
            )));
        }
        let claimed = writes && disk.is_claimed();
        Ok(claimed.then(|| {
            "another device is made of it, or Xen's own back-end has it (lsblk says which)"
                .to_owned()
        }))
    }

    /// Where it is mounted, and whether for writing: there, if it is so anywhere.
    fn mount(&self, mounts: &str) -> Option<(String, bool)> {
        let found = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let device = parse_device(fields.next()?)?;
            let (place, options) = (fields.nth(1)?, fields.next()?);
            let writes = options.split(',').any(|option| option == "rw");
            self.same
                .contains(&Store::Device(device))
                .then(|| (place.to_owned(), writes))
        });
        found.max_by_key(|(_, writes)| *writes)
    }
}

fn file_of(data: &fs::Metadata) -> Store {
    Store::File {
        device: data.dev(),
        inode: data.ino(),
    }
}

/// Every loop device with a file: its name, its number, and the file.
fn loop_devices(sysfs: &Path) -> Vec<(String, u64, Option<Store>)> {
    let devices = fs::read_dir(sysfs.join("block"))
        .into_iter()
        .flatten()
        .flatten();
    let loops = devices.filter(|device| device.file_name().to_string_lossy().starts_with("loop"));
    loops
        .filter_map(|device| {
            let number = device_number(&device.path().join("dev"))?;
            let name = device.file_name().to_string_lossy().into_owned();
            Some((name, number, backing_file(&device.path())))
        })
        .collect()
}

/// The file that a loop device, if this is one, is on.
fn backing_file(device: &Path) -> Option<Store> {
    let path = fs::read_to_string(device.join("loop/backing_file")).ok()?;
    let data = fs::metadata(path.trim_end_matches('\n')).ok()?;
    Some(file_of(&data))
}

fn device_number(path: &Path) -> Option<u64> {
    parse_device(fs::read_to_string(path).ok()?.trim_end())
}

/// The number of `major:minor`.
fn parse_device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(
        major.parse().ok()?,
        minor.parse().ok()?,
    ))
}

/// The disks, the network interfaces, the other ends of consoles, and the input devices, that guests use now.
#[derive(Debug, Default)]
pub(crate) struct Uses {
    uses: Vec<Use>,
    interfaces: Vec<InterfaceUse>,
    pub(crate) consoles: Consoles,
    pub(crate) inputs: Inputs,
}

/// An interface that a device of a guest has: the kernel would let others have some of its queues.
#[derive(Debug)]
struct InterfaceUse {
    interface: String,
    guest: Identity,
    name: String,
    key: EntryKey,
    /// It was made for the device, and goes with it.
    made: Option<MadeInterface>,
}

#[derive(Debug)]
struct Use {
    guest: Identity,
    name: String,
    key: EntryKey,
    path: PathBuf,
    stores: Stores,
    writes: bool,
    lock: DeviceLock,
    /// The guest has it no more. What a worker has left of it may be under way still.
    is_over: bool,
}

/// The lock that a worker has on a disk, and transfers that it has left, see [`lock`](super::lock).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceLock {
    pub(crate) name: u64,
    /// Of the file or the device node.
    pub(crate) inode: u64,
}

/// What a guest is to use.
#[derive(Debug)]
pub(crate) struct WantedDisk<'a> {
    pub(crate) guest: &'a Identity,
    pub(crate) name: &'a str,
    pub(crate) key: EntryKey,
    pub(crate) path: &'a Path,
    pub(crate) stores: Stores,
    pub(crate) writes: bool,
    pub(crate) lock: DeviceLock,
}

impl Uses {
    /// Who has what is wanted, so that nobody else may: on one line.
    pub(crate) fn conflict(&mut self, wanted: &WantedDisk<'_>) -> Option<String> {
        let locks = LazyCell::new(Locks::read);
        self.uses
            .retain(|other| !other.is_over || locks.have(other.lock.name, Some(other.lock.inode)));
        let conflicts = |other: &&Use| {
            let is_itself = other.guest == *wanted.guest && other.key == wanted.key;
            !is_itself && (other.writes || wanted.writes) && other.stores.overlaps(&wanted.stores)
        };
        // Of a guest that has it again, what it had before is no news.
        let (over, now): (Vec<_>, Vec<_>) = self.uses.iter().partition(|other| other.is_over);
        let other = now.into_iter().chain(over).find(|other| conflicts(other))?;
        let same_path = other.path == wanted.path;
        let path = if same_path {
            String::new()
        } else {
            format!(" as {}", other.path.display())
        };
        let (has, why) = if other.is_over {
            ("had", "; what was under way then has not ended")
        } else {
            ("has", "")
        };
        Some(format!(
            "guest {} ({}) {has} it{path}: {}{why}",
            other.name, other.guest.domid, other.key
        ))
    }

    pub(crate) fn add(&mut self, wanted: WantedDisk<'_>) {
        // A disk that a device has once more is one use: what is under way of it has the lock still.
        self.uses.retain(|other| {
            let is_again = other.guest == *wanted.guest
                && other.key == wanted.key
                && other.lock == wanted.lock
                && other.stores == wanted.stores;
            !is_again || (other.writes && !wanted.writes)
        });
        self.end(wanted.guest, wanted.key);
        self.uses.push(Use {
            guest: wanted.guest.clone(),
            name: wanted.name.to_owned(),
            key: wanted.key,
            path: wanted.path.to_owned(),
            stores: wanted.stores,
            writes: wanted.writes,
            lock: wanted.lock,
            is_over: false,
        });
    }

    /// Has a device of a guest use an interface. False if it does so already.
    ///
    /// # Errors
    ///
    /// Who else uses it, on one line.
    pub(crate) fn take_interface(
        &mut self,
        interface: &str,
        guest: &Identity,
        name: &str,
        key: EntryKey,
        made: Option<MadeInterface>,
    ) -> Result<bool, String> {
        let is_itself = |other: &InterfaceUse| other.guest == *guest && other.key == key;
        let mut others = self.interfaces.iter().filter(|other| !is_itself(other));
        if let Some(other) = others.find(|other| other.interface == interface) {
            let InterfaceUse {
                guest, name, key, ..
            } = other;
            return Err(format!("guest {name} ({}) has it: {key}", guest.domid));
        }
        let before = self.interfaces.len();
        self.interfaces.retain(|other| !is_itself(other));
        let is_new = self.interfaces.len() == before;
        self.interfaces.push(InterfaceUse {
            interface: interface.to_owned(),
            guest: guest.clone(),
            name: name.to_owned(),
            key,
            made,
        });
        Ok(is_new)
    }

    /// The device has not got the interface after all.
    pub(crate) fn give_up_interface(&mut self, guest: &Identity, key: EntryKey) {
        let is_its = |other: &InterfaceUse| other.guest == *guest && other.key == key;
        self.interfaces.retain(|other| !is_its(other));
    }

    fn end_interfaces(&mut self, is_over: impl Fn(&InterfaceUse) -> bool) {
        let over = self.interfaces.extract_if(.., |other| is_over(other));
        for made in over.filter_map(|other| other.made) {
            net::end(made);
        }
    }

    /// The device is taken away, or has another disk.
    pub(crate) fn end(&mut self, guest: &Identity, key: EntryKey) {
        self.end_interfaces(|other| other.guest == *guest && other.key == key);
        self.consoles.end(guest, key);
        self.inputs.end(guest, key);
        for other in &mut self.uses {
            other.is_over |= other.guest == *guest && other.key == key;
        }
    }

    /// The guest, and whoever served it, is gone.
    pub(crate) fn end_guest(&mut self, guest: &Identity) {
        self.end_interfaces(|other| other.guest == *guest);
        self.consoles.end_guest(guest);
        self.inputs.end_guest(guest);
        for other in &mut self.uses {
            other.is_over |= other.guest == *guest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::blk::lock;
    use crate::toolstack::libxl::EntryForm;

    const fn device(minor: u64) -> Store {
        Store::Device(minor)
    }

    fn stores(same: &[Store], whole: Option<Store>) -> Stores {
        Stores {
            same: same.iter().cloned().collect(),
            whole,
            loops: Vec::new(),
        }
    }

    #[test]
    fn an_interface_is_one_devices_until_it_is_let_go() {
        let guest = |domid| Identity { domid, vm: None };
        let key = |devid| EntryKey {
            form: EntryForm::Virtio,
            devid,
        };
        let mut uses = Uses::default();
        uses.take_interface("tap7", &guest(3), "ivi", key(0), None)
            .unwrap();
        // Once more, for its next worker.
        uses.take_interface("tap7", &guest(3), "ivi", key(0), None)
            .unwrap();
        let error = uses.take_interface("tap7", &guest(3), "ivi", key(1), None);
        assert_eq!(error.unwrap_err(), "guest ivi (3) has it: virtio/0");
        uses.take_interface("tap7", &guest(4), "web", key(0), None)
            .unwrap_err();
        uses.take_interface("tap8", &guest(4), "web", key(0), None)
            .unwrap();
        uses.end(&guest(3), key(0));
        uses.take_interface("tap7", &guest(4), "web", key(1), None)
            .unwrap();
        uses.end_guest(&guest(4));
        uses.take_interface("tap8", &guest(3), "ivi", key(0), None)
            .unwrap();
    }

    #[test]
    fn partitions_overlap_their_disk_and_not_each_other() {
        let whole = stores(&[device(1)], None);
        let [first, second] = [2, 3].map(|minor| stores(&[device(minor)], Some(device(1))));
        assert!(whole.overlaps(&first) && first.overlaps(&whole) && first.overlaps(&first));
        assert!(!first.overlaps(&second) && !whole.overlaps(&stores(&[device(4)], None)));
    }

    /// A file, and a sysfs with a loop device on it.
    #[test]
    fn a_loop_device_is_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let file = File::create(&image).unwrap();
        let entry = directory.path().join("block/loop3");
        fs::create_dir_all(entry.join("loop")).unwrap();
        fs::write(entry.join("dev"), "7:3\n").unwrap();
        fs::write(
            entry.join("loop/backing_file"),
            format!("{}\n", image.display()),
        )
        .unwrap();
        let other = directory.path().join("block/loop4");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("dev"), "7:4\n").unwrap();
        let found = Stores::look(&file, directory.path()).unwrap();
        assert_eq!(found.loops, ["loop3"]);
        let number = |minor| Store::Device(rustix::fs::makedev(7, minor));
        assert!(found.overlaps(&stores(&[number(3)], None)));
        assert!(!found.overlaps(&stores(&[number(4)], None)));
        // The same file by another name.
        let link = directory.path().join("link.img");
        fs::hard_link(&image, &link).unwrap();
        let linked = Stores::look(&File::open(link).unwrap(), directory.path()).unwrap();
        assert!(linked.overlaps(&found));
    }

    #[test]
    fn a_mount_is_found_by_its_device() {
        let mounts = "36 35 254:1 / / rw,noatime shared:1 - ext4 /dev/root rw\n\
                      40 36 7:3 / /mnt/disk ro,relatime - ext4 /dev/loop3 ro\n";
        let of = |major, minor| {
            stores(&[Store::Device(rustix::fs::makedev(major, minor))], None).mount(mounts)
        };
        assert_eq!(of(254, 1), Some(("/".to_owned(), true)));
        assert_eq!(of(7, 3), Some(("/mnt/disk".to_owned(), false)));
        assert_eq!(of(7, 4), None);
    }

    #[test]
    fn a_disk_that_is_written_has_one_user() {
        let guest = |domid| Identity {
            domid,
            vm: Some(format!("/vm/{domid}")),
        };
        let key = |devid| EntryKey {
            form: EntryForm::Disk,
            devid,
        };
        let image = tempfile::NamedTempFile::new().unwrap();
        let device_lock = DeviceLock {
            name: lock::name("/vm/1", key(51712)),
            inode: image.as_file().metadata().unwrap().ino(),
        };
        let mut uses = Uses::default();
        let guests = [guest(1), guest(2)];
        let wanted = |index: usize, devid, path: &'static str, writes| WantedDisk {
            guest: &guests[index],
            name: ["ivi", "rtos"][index],
            key: key(devid),
            path: Path::new(path),
            stores: stores(&[device(7)], None),
            writes,
            lock: device_lock,
        };
        uses.add(wanted(0, 51712, "/dev/vg/a", false));
        assert_eq!(uses.conflict(&wanted(1, 51712, "/dev/vg/a", false)), None);
        // The one that has it may have it anew, and otherwise.
        assert_eq!(uses.conflict(&wanted(0, 51712, "/dev/vg/a", true)), None);
        assert_eq!(
            uses.conflict(&wanted(1, 51712, "/dev/vg/a", true)).unwrap(),
            "guest ivi (1) has it: virtio_disk/51712"
        );
        uses.add(wanted(0, 51712, "/dev/vg/a", true));
        for (index, devid) in [(1, 51712), (0, 51728)] {
            assert_eq!(
                uses.conflict(&wanted(index, devid, "/dev/dm-3", false))
                    .unwrap(),
                "guest ivi (1) has it as /dev/vg/a: virtio_disk/51712"
            );
        }
        uses.end(&guests[0], key(51712));
        assert_eq!(uses.conflict(&wanted(1, 51712, "/dev/dm-3", true)), None);
        uses.add(wanted(0, 51712, "/dev/vg/a", true));
        // A worker was killed, and a transfer that it has begun hangs.
        let left = image.reopen().unwrap().into();
        lock::take(&left, device_lock.name).unwrap();
        uses.end_guest(&guests[0]);
        assert_eq!(
            uses.conflict(&wanted(1, 51712, "/dev/dm-3", true)).unwrap(),
            "guest ivi (1) had it as /dev/vg/a: virtio_disk/51712; what was under way then has not ended"
        );
        // Tried again and again by its guest, it is one use still; who has it now is told first.
        for _ in 0..3 {
            uses.add(wanted(0, 51712, "/dev/vg/a", true));
        }
        assert_eq!(uses.uses.len(), 1);
        assert_eq!(
            uses.conflict(&wanted(1, 51712, "/dev/vg/a", true)).unwrap(),
            "guest ivi (1) has it: virtio_disk/51712"
        );
        uses.end_guest(&guests[0]);
        drop(left);
        lock::tests::until_free(|| {
            let wanted = wanted(1, 51712, "/dev/dm-3", true);
            uses.conflict(&wanted).is_none()
        });
    }
}
