//! What of the devices is shown, in which order.

use ratatui::crossterm::event::KeyCode;
use std::cmp::Ordering;
use std::fs;
use xen_virtio_dom0_tools::ctl::rates::DeviceRates;

/// What devices are ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    Guest,
    Requests,
    Bytes,
    Latency,
    Processor,
}

impl Order {
    const ALL: [Self; 5] = [
        Self::Guest,
        Self::Requests,
        Self::Bytes,
        Self::Latency,
        Self::Processor,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Requests => "requests",
            Self::Bytes => "bytes",
            Self::Latency => "latency",
            Self::Processor => "processor",
        }
    }

    fn next(self) -> Self {
        let place = Self::ALL.iter().position(|order| *order == self);
        Self::ALL[(place.unwrap_or(0) + 1) % Self::ALL.len()]
    }

    /// The largest first, but for names.
    fn compare(self, one: &DeviceRates, other: &DeviceRates) -> Ordering {
        let number = |device: &DeviceRates| {
            let rates = device.rates.as_ref();
            rates.map_or(0.0, |rates| match self {
                Self::Guest => 0.0,
                Self::Requests => rates.requests,
                Self::Bytes => rates.bytes,
                Self::Latency => rates.most_us.unwrap_or(0) as f64,
                Self::Processor => device.cpu_percent.unwrap_or(0.0),
            })
        };
        let names = |device: &DeviceRates| (device.guest.clone(), device.device.clone());
        let by_number = number(other).total_cmp(&number(one));
        by_number.then_with(|| names(one).cmp(&names(other)))
    }
}

/// What is to be done after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Show,
    Leave,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    devices: Vec<DeviceRates>,
    pub(super) order: Order,
    /// Devices are shown that have this in their guest's name, their own or that of their kind.
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) is_typing: bool,
    /// The guest and the device on which the cursor is.
    selected: Option<(u16, String)>,
    /// One device is shown whole.
    pub(super) is_whole: bool,
    /// Why what is shown is old.
    pub(super) problem: Option<String>,
}

impl Table {
    pub(super) fn update(&mut self, devices: Vec<DeviceRates>) {
        self.devices = devices;
    }

    /// The devices that are shown, in their order.
    pub(super) fn rows(&self) -> Vec<&DeviceRates> {
        let is_wanted = |device: &&DeviceRates| {
            let texts = [&device.guest, &device.device, &device.kind];
            texts.into_iter().any(|text| text.contains(&self.filter))
        };
        let mut rows: Vec<_> = self.devices.iter().filter(is_wanted).collect();
        rows.sort_by(|one, other| self.order.compare(one, other));
        rows
    }

    /// The place of the cursor among [`Table::rows`].
    pub(super) fn cursor(&self) -> usize {
        let is_it = |device: &&DeviceRates| {
            let selected = self.selected.as_ref();
            selected.is_some_and(|(domid, name)| device.domid == *domid && device.device == *name)
        };
        self.rows().iter().position(is_it).unwrap_or(0)
    }

    fn select(&mut self, place: usize) {
        let rows = self.rows();
        let row = rows.get(place.min(rows.len().saturating_sub(1)));
        self.selected = row.map(|row| (row.domid, row.device.clone()));
    }

    /// Somebody has pressed `key`.
    pub(super) fn take(&mut self, key: KeyCode) -> Next {
        if self.is_typing {
            match key {
                KeyCode::Char(c) => self.filter.push(c),
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Esc => {
                    self.filter.clear();
                    self.is_typing = false;
                }
                KeyCode::Enter => self.is_typing = false,
                _ => {}
            }
            return Next::Show;
        }
        match key {
            KeyCode::Char('q') => return Next::Leave,
            KeyCode::Esc if self.is_whole => self.is_whole = false,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Down | KeyCode::Char('j') => self.select(self.cursor() + 1),
            KeyCode::Up | KeyCode::Char('k') => self.select(self.cursor().saturating_sub(1)),
            KeyCode::Enter => {
                self.select(self.cursor());
                self.is_whole = !self.is_whole;
            }
            _ => {}
        }
        Next::Show
    }
}

/// KiB of memory that process `worker` has.
pub(super) fn resident_kib(worker: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{worker}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use xen_virtio_dom0_tools::ctl::rates::{BEYOND, Rates};

    pub(in crate::top) fn device(guest: &str, device: &str, requests: f64) -> DeviceRates {
        DeviceRates {
            domid: u16::from(guest.as_bytes()[0]),
            guest: guest.to_owned(),
            device: device.to_owned(),
            kind: "blk".to_owned(),
            state: "running",
            worker: None,
            cpu_percent: Some(12.5),
            rates: (requests > 0.0).then_some(Rates {
                requests,
                bytes: requests * 4096.0,
                half_us: Some(64),
                most_us: Some(BEYOND),
                traps: 0.25,
                interrupts: 1.0,
                mapped: 6,
                under_way: 2,
            }),
        }
    }

    fn names(table: &Table) -> Vec<String> {
        let rows = table.rows().into_iter();
        rows.map(|row| format!("{} {}", row.guest, row.device))
            .collect()
    }

    fn press(table: &mut Table, keys: &str) {
        for key in keys.chars() {
            let key = match key {
                '\n' => KeyCode::Enter,
                '\x1b' => KeyCode::Esc,
                '\x08' => KeyCode::Backspace,
                key => KeyCode::Char(key),
            };
            assert_eq!(table.take(key), Next::Show);
        }
    }

    #[test]
    fn devices_are_ordered_and_filtered_by_keys() {
        let mut table = Table::default();
        table.update(vec![
            device("b", "virtio/0", 9.0),
            device("a", "virtio/1", 0.0),
            device("a", "virtio/0", 100.0),
        ]);
        assert_eq!(names(&table), ["a virtio/0", "a virtio/1", "b virtio/0"]);
        press(&mut table, "s");
        assert_eq!(names(&table), ["a virtio/0", "b virtio/0", "a virtio/1"]);
        press(&mut table, "/o/1x\x08\n");
        assert_eq!(names(&table), ["a virtio/1"]);
        press(&mut table, "\x1b");
        assert_eq!(names(&table).len(), 3);
        // What stands for a key elsewhere is text while a filter is typed.
        press(&mut table, "/q");
        assert_eq!(names(&table), Vec::<String>::new());
        press(&mut table, "\x1b");
        assert_eq!(table.take(KeyCode::Char('q')), Next::Leave);
    }

    #[test]
    fn the_cursor_stays_on_its_device_whatever_the_order() {
        let mut table = Table::default();
        table.update(vec![
            device("a", "virtio/0", 1.0),
            device("b", "virtio/0", 9.0),
        ]);
        press(&mut table, "jjj");
        assert_eq!(table.cursor(), 1);
        press(&mut table, "s");
        assert_eq!(table.cursor(), 0);
        press(&mut table, "\n");
        assert!(table.is_whole);
        press(&mut table, "\x1b");
        assert!(!table.is_whole);
        table.update(Vec::new());
        press(&mut table, "kj\n");
        assert_eq!(table.cursor(), 0);
    }
}
