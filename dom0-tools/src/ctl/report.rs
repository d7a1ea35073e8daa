//! What `xen-virtioctl list` shows.

use crate::devices::{self, DeviceKind};
use crate::toolstack::libxl::{EntryForm, EntryKey, entry_path};
use crate::worker::event_loop::EventLoopReport;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write};
use virtio_bindings::{virtio_config as config, virtio_ring as ring};
use xen_virtio_backend::DeviceType;
use xen_virtio_transport::DeviceReport;

/// All guests that have a virtio device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub guests: Vec<GuestReport>,
    /// Devices that their guests were created for in vain, the last ones.
    #[serde(default)]
    pub refusals: Vec<Refusal>,
}

/// A device that was not served, so that xl gave its guest up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub domid: u16,
    pub guest: String,
    pub key: EntryKey,
    pub error: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    pub domid: u16,
    pub name: String,
    /// The process that serves the guest, while there is one.
    pub worker: Option<u32>,
    /// How often another one was started in place of one that had died.
    #[serde(default)]
    pub restarts: u64,
    /// Why there is none, or why it does not answer.
    pub error: Option<String>,
    /// It is kept from running until its devices are served.
    #[serde(default)]
    pub held: bool,
    /// What the worker says of itself.
    pub server: Option<EventLoopReport>,
    pub devices: Vec<EntryReport>,
    /// Devices that are being taken away.
    #[serde(default)]
    pub closing: Vec<ClosingReport>,
}

/// A device that is being taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosingReport {
    pub key: EntryKey,
    /// Where the guest had it, if that is known.
    pub base: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryReport {
    pub key: EntryKey,
    /// A virtio device type number, and where the guest finds the device, once its entry was read.
    #[serde(default)]
    pub device_type: Option<u32>,
    #[serde(default)]
    pub base: Option<u64>,
    /// What the device is, by libxl's entry: the path of a disk, say.
    pub detail: String,
    pub error: Option<String>,
    /// What the error tells of may go away by itself: it is tried again soon.
    #[serde(default)]
    pub busy: bool,
    /// The guest has it, or has had it.
    #[serde(default)]
    pub served: bool,
    /// From finding libxl's entry to having the device's page claimed, once it is.
    pub claimed_after_ms: Option<u64>,
    /// What its integrator should know, though nothing has failed.
    #[serde(default)]
    pub hint: Option<String>,
    /// What the worker says of the device, once it has it.
    pub device: Option<DeviceReport>,
}

impl EntryReport {
    /// The name of its kind: what the service knows counts more than its worker's word.
    pub fn kind_name(&self) -> String {
        let disk = (self.key.form == EntryForm::Disk).then_some(DeviceType::BLOCK.0);
        let said = self.device.as_ref().map(|device| device.device_type);
        let kind = self.device_type.or(disk).or(said);
        kind.map_or_else(|| "?".to_owned(), type_name)
    }

    /// Whether nothing keeps it from being used, as far as its worker has just said; there is nothing to be said of an empty slot.
    pub fn is_served(&self) -> bool {
        if self.is_slot() {
            return self.error.is_none() && self.claimed_after_ms.is_some();
        }
        let lost = config::VIRTIO_CONFIG_S_NEEDS_RESET | config::VIRTIO_CONFIG_S_FAILED;
        let works = |device: &DeviceReport| device.failure.is_none() && device.status & lost == 0;
        self.error.is_none() && self.device.as_ref().is_some_and(works)
    }

    /// Whether it is a place for a device that may be attached.
    pub fn is_slot(&self) -> bool {
        self.device_type == Some(DeviceType::NONE.0)
    }

    /// Whether it is such a place, and `guest` has a device there.
    fn is_taken(&self, guest: &GuestReport) -> bool {
        let others = guest.devices.iter().filter(|other| other.key != self.key);
        let bases = others.map(|other| other.base);
        let closing = guest.closing.iter().map(|other| other.base);
        self.is_slot() && bases.chain(closing).any(|base| base == self.base)
    }

    /// One word, or a few, on how the device is.
    pub fn state(&self) -> &'static str {
        let Some(device) = &self.device else {
            return if self.error.is_some() {
                "failed"
            } else if self.claimed_after_ms.is_some() {
                // Its worker is busy, or is just being followed by another one.
                match self.is_slot() {
                    true => "waiting",
                    false => "served",
                }
            } else {
                "starting"
            };
        };
        let has = |bit: u32| device.status & bit != 0;
        if has(config::VIRTIO_CONFIG_S_NEEDS_RESET) {
            "needs reset"
        } else if has(config::VIRTIO_CONFIG_S_FAILED) {
            "given up by the guest"
        } else if has(config::VIRTIO_CONFIG_S_DRIVER_OK) {
            "running"
        } else if device.status == 0 {
            "no driver"
        } else {
            "probing"
        }
    }
}

/// The names of the feature bits that are set in `features`, for a device of this type.
pub fn feature_names(device_type: u32, features: u64) -> Vec<String> {
    let common: &[(u32, &str)] = &[
        (ring::VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
        (config::VIRTIO_F_VERSION_1, "VERSION_1"),
        (config::VIRTIO_F_ACCESS_PLATFORM, "ACCESS_PLATFORM"),
    ];
    let own = known(device_type).map_or(&[][..], DeviceKind::feature_names);
    (0..u64::BITS)
        .filter(|bit| features & (1 << bit) != 0)
        .map(|bit| {
            let name = own.iter().chain(common).find(|(known, _)| *known == bit);
            name.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
        })
        .collect()
}

fn type_name(device_type: u32) -> String {
    known(device_type).map_or_else(
        || format!("type {device_type}"),
        |kind| kind.name().to_owned(),
    )
}

/// The first kind of this device type: names are the same for all.
fn known(device_type: u32) -> Option<&'static dyn DeviceKind> {
    devices::all_kinds().find(|kind| kind.device_type().0 == device_type)
}

/// Which of the guests of these numbers and names is `wanted`. A guest may have chosen its name (init-dom0less), which may be a
/// number, or another one's name: a number goes first.
///
/// # Errors
///
/// If there is none, or several have the name.
pub(crate) fn which<'a>(
    names: impl Iterator<Item = (u16, &'a str)>,
    wanted: &str,
) -> Result<u16, String> {
    let number = wanted.parse().ok();
    let mut named = Vec::new();
    for (domid, name) in names {
        if Some(domid) == number {
            return Ok(domid);
        }
        if name == wanted {
            named.push(domid);
        }
    }
    match named[..] {
        [domid] => Ok(domid),
        [] => Err(format!("there is no guest {wanted} with a virtio device")),
        _ => Err(format!(
            "the guests {named:?} are all named {wanted}: give the number of one"
        )),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.guests.is_empty() {
            writeln!(
                f,
                "No guest has a virtio device. In its xl file: disk = [ \"backendtype=standalone, \
                 specification=virtio, grant_usage=1, vdev=xvda, access=rw, target=/path\" ]"
            )?;
            return self.write_refusals(f);
        }
        let header = [
            "DOMID", "GUEST", "DEVICE", "TYPE", "STATE", "QUEUES", "GRANTS", "FRAMES", "REQUESTS",
            "ERRORS",
        ];
        let mut rows = vec![header.map(str::to_owned)];
        let mut notes = String::new();
        for guest in &self.guests {
            if let Some(error) = &guest.error {
                writeln!(notes, "guest {} ({}): {error}", guest.name, guest.domid)?;
            }
            if guest.held {
                writeln!(
                    notes,
                    "guest {} ({}): it is paused until its devices are served",
                    guest.name, guest.domid
                )?;
            }
            if guest.restarts > 0 {
                writeln!(
                    notes,
                    "guest {} ({}): workers of it that have died, each followed by another one: {}",
                    guest.name, guest.domid, guest.restarts
                )?;
            }
            for ClosingReport { key, .. } in &guest.closing {
                let path = entry_path(guest.domid, *key);
                writeln!(
                    notes,
                    "{path}: is being taken away, when its transfers have ended"
                )?;
            }
            for entry in &guest.devices {
                rows.push(entry.row(guest));
                entry.note(guest, &mut notes)?;
            }
        }
        write_table(f, &rows)?;
        if !notes.is_empty() {
            write!(f, "\n{notes}")?;
        }
        self.write_refusals(f)
    }
}

impl Report {
    /// Every device, with its guest.
    pub fn devices(&self) -> impl Iterator<Item = (&GuestReport, &EntryReport)> {
        let guests = self.guests.iter();
        guests.flat_map(|guest| guest.devices.iter().map(move |entry| (guest, entry)))
    }

    /// The guest of that domid, or else the only one of that name.
    ///
    /// # Errors
    ///
    /// If there is none, or several have the name.
    pub fn find(&self, guest: &str) -> Result<&GuestReport, String> {
        let names = self.guests.iter();
        let names = names.map(|known| (known.domid, known.name.as_str()));
        let domid = which(names, guest)?;
        let mut guests = self.guests.iter();
        let found = guests.find(|known| known.domid == domid);
        Ok(found.expect("a guest of this report"))
    }

    /// As [`Report::find`].
    pub fn of(&self, guest: &str) -> Option<&GuestReport> {
        self.find(guest).ok()
    }

    fn write_refusals(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.refusals.is_empty() {
            writeln!(f, "\nNot served lately, so that xl gave the guest up:")?;
        }
        for Refusal {
            domid,
            guest,
            key,
            error,
        } in &self.refusals
        {
            writeln!(f, "guest {guest} ({domid}), {key}: {error}")?;
        }
        Ok(())
    }
}

impl EntryReport {
    fn row(&self, guest: &GuestReport) -> [String; 10] {
        let none = DeviceReport::default();
        let device = self.device.as_ref().unwrap_or(&none);
        [
            guest.domid.to_string(),
            guest.name.clone(),
            self.key.to_string(),
            self.kind_name(),
            if self.is_taken(guest) {
                "taken"
            } else {
                self.state()
            }
            .to_owned(),
            format!("{}/{}", device.ready_queues, device.queues),
            device.grants_mapped.to_string(),
            device.frames_mapped.to_string(),
            device.requests.to_string(),
            device.request_errors.to_string(),
        ]
    }

    fn note(&self, guest: &GuestReport, notes: &mut String) -> fmt::Result {
        let path = entry_path(guest.domid, self.key);
        for text in [&self.error, &self.hint].into_iter().flatten() {
            writeln!(notes, "{path}: {text}")?;
        }
        if self.is_slot()
            && !self.is_taken(guest)
            && let Some(base) = self.base
        {
            writeln!(notes, "{path}: {} at {base:#x}", self.detail)?;
        }
        if let Some(device) = &self.device {
            let features = feature_names(device.device_type, device.features).join(" ");
            let features = if features.is_empty() {
                "none yet".to_owned()
            } else {
                features
            };
            writeln!(notes, "{path}: {}; features: {features}", self.detail)?;
            if let Some(failure) = &device.failure {
                writeln!(
                    notes,
                    "{path}: needs a reset by the guest's driver: {failure}"
                )?;
            }
            for text in [&device.misstep, &device.warning].into_iter().flatten() {
                writeln!(notes, "{path}: {text}")?;
            }
            if device.refused_addresses > 0 {
                writeln!(
                    notes,
                    "{path}: {} addresses of the guest refused",
                    device.refused_addresses
                )?;
            }
        }
        Ok(())
    }
}

/// Writes rows whose cells stand below each other; the first is the header.
pub(crate) fn write_table<const COLUMNS: usize>(
    f: &mut fmt::Formatter<'_>,
    rows: &[[String; COLUMNS]],
) -> fmt::Result {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            write!(line, "{cell:width$}  ")?;
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod sample;

#[cfg(test)]
mod tests {
    use super::*;

    fn report(device: Option<DeviceReport>, error: Option<&str>) -> Report {
        let mut report = sample::report(device);
        report.guests[0].devices[0].error = error.map(str::to_owned);
        report
    }

    #[test]
    fn the_table_says_what_runs_and_with_which_features() {
        let device = DeviceReport {
            device_type: 2,
            status: 0xf,
            features: 1 << 32 | 1 << 33 | 1 << 29 | 1 << 9 | 1 << 50,
            queues: 2,
            ready_queues: 2,
            grants_mapped: 14,
            requests: 99,
            ..DeviceReport::default()
        };
        let text = report(Some(device), None).to_string();
        for expected in [
            "running",
            "2/2",
            "14",
            "99",
            "FLUSH EVENT_IDX VERSION_1 ACCESS_PLATFORM bit 50",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn an_error_is_shown_with_its_entry() {
        let text = report(
            None,
            Some("disk /x: is neither a regular file nor a block device"),
        )
        .to_string();
        assert!(
            text.contains("failed") && text.contains("backend/virtio_disk/3/51712: disk /x"),
            "{text}"
        );
    }

    #[test]
    fn a_slot_says_where_it_is_until_a_device_is_there() {
        let mut report = report(Some(DeviceReport::default()), None);
        let device = &report.guests[0].devices[0];
        let slot = EntryReport {
            key: EntryKey {
                form: EntryForm::Virtio,
                devid: 3,
            },
            device_type: Some(DeviceType::NONE.0),
            base: Some(0x200_0600),
            detail: "an empty slot".into(),
            claimed_after_ms: Some(1),
            device: None,
            ..device.clone()
        };
        report.guests[0].devices.push(slot);
        let text = report.to_string();
        let place = "backend/virtio/3/3: an empty slot at 0x2000600";
        assert!(text.contains(place) && text.contains("waiting"), "{text}");
        report.guests[0].devices[0].base = Some(0x200_0600);
        let text = report.to_string();
        assert!(!text.contains(place) && text.contains("taken"), "{text}");
        // Nor is it empty before the last device has gone.
        let EntryReport { key, base, .. } = report.guests[0].devices.remove(0);
        report.guests[0].closing.push(ClosingReport { key, base });
        let text = report.to_string();
        assert!(!text.contains(place) && text.contains("taken"), "{text}");
    }

    #[test]
    fn a_report_survives_json() {
        let report = report(Some(DeviceReport::default()), Some("x"));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }

    #[test]
    fn a_guest_goes_by_its_number_and_else_by_a_name_that_no_other_has() {
        let guests = [(3, "ivi"), (4, "3"), (5, "web"), (6, "web"), (7, "9")];
        let find = |wanted| which(guests.into_iter(), wanted);
        assert_eq!([find("ivi"), find("3"), find("9")], [Ok(3), Ok(3), Ok(7)]);
        assert_eq!(find("6"), Ok(6));
        assert!(find("web").unwrap_err().contains("[5, 6]"));
        assert!(find("cluster").unwrap_err().contains("no guest cluster"));
    }
}
