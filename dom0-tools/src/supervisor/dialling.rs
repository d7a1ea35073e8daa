//! The connections that guests ask for, to sockets of dom0's: their workers can make none.

use crate::connections::connect_to;
use crate::toolstack::libxl::{EntryKey, MAX_DEVICES};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xen_virtio_backend::vsock::Dial;

/// What one guest may have us connect in a time: it costs others nothing that they would notice.
const IN_A_PERIOD: usize = 64;
const PERIOD: Duration = Duration::from_millis(100);

/// How often a connection is tried that could not be made for now: for two seconds.
const TRIES: u32 = 20;

/// What a worker may ask for and not have been answered: it keeps to this itself.
pub(super) const MOST: usize = Dial::MOST * MAX_DEVICES;

/// A connection that a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dialled {
    pub(super) domid: u16,
    pub(super) key: EntryKey,
    /// What its worker knows it by.
    pub(super) number: u64,
    pub(super) port: u32,
    /// How often it was put back.
    pub(super) tries: u32,
}

#[derive(Default)]
pub(super) struct Dialling {
    /// Where devices' sockets are, but for the ports.
    places: BTreeMap<(u16, EntryKey), PathBuf>,
    waiting: VecDeque<Dialled>,
    paces: BTreeMap<u16, Pace>,
}

/// What a guest has had of its period.
struct Pace {
    until: Instant,
    left: usize,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            until: now + PERIOD,
            left: IN_A_PERIOD,
        }
    }
}

/// A worker asks for more than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMany;

impl Dialling {
    /// The sockets that a device reaches are at `place`, a low line, and their port. What an earlier worker has asked for is not
    /// what this device's next one waits for.
    pub(super) fn have(&mut self, device: (u16, EntryKey), place: Option<PathBuf>) {
        self.end(device);
        if let Some(place) = place {
            self.places.insert(device, place);
        }
    }

    /// What the device's worker has asked for nobody waits for any more.
    pub(super) fn forget(&mut self, (domid, key): (u16, EntryKey)) {
        let is_its = |dialled: &Dialled| dialled.domid == domid && dialled.key == key;
        self.waiting.retain(|dialled| !is_its(dialled));
    }

    pub(super) fn end(&mut self, device: (u16, EntryKey)) {
        self.forget(device);
        self.places.remove(&device);
    }

    pub(super) fn end_guest(&mut self, domid: u16) {
        self.waiting.retain(|dialled| dialled.domid != domid);
        self.places.retain(|(other, _), _| *other != domid);
        self.paces.remove(&domid);
    }

    /// # Errors
    ///
    /// [`TooMany`].
    pub(super) fn ask(&mut self, dialled: Dialled) -> Result<(), TooMany> {
        let of_guest = self
            .waiting
            .iter()
            .filter(|other| other.domid == dialled.domid);
        if of_guest.count() >= MOST {
            return Err(TooMany);
        }
        self.waiting.push_back(dialled);
        Ok(())
    }

    /// Whether something may be made or handed on for a guest now. It counts, if so.
    pub(super) fn admits(&mut self, domid: u16, now: Instant) -> bool {
        let pace = self.paces.entry(domid).or_insert_with(|| Pace::new(now));
        if pace.until <= now {
            *pace = Pace::new(now);
        }
        let is_admitted = pace.left > 0;
        pace.left = pace.left.saturating_sub(1);
        is_admitted
    }

    /// The next one that is to be answered now.
    pub(super) fn next(&mut self, now: Instant) -> Option<Dialled> {
        let guests: BTreeSet<_> = self.waiting.iter().map(|dialled| dialled.domid).collect();
        let domid = guests.into_iter().find(|domid| self.admits(*domid, now))?;
        let mut waiting = self.waiting.iter();
        let index = waiting.position(|dialled| dialled.domid == domid)?;
        self.waiting.remove(index)
    }

    /// It could not be made for now. False if it is to be tried no more.
    pub(super) fn put_back(&mut self, dialled: Dialled) -> bool {
        let tries = dialled.tries + 1;
        if tries < TRIES {
            self.wait(Dialled { tries, ..dialled });
        }
        tries < TRIES
    }

    /// It waits behind the others, for the guest's next period. Its worker waits for the answer, however long it does not read.
    pub(super) fn wait(&mut self, dialled: Dialled) {
        self.waiting.push_back(dialled);
        if let Some(pace) = self.paces.get_mut(&dialled.domid) {
            pace.left = 0;
        }
    }

    /// When there is one to be answered.
    pub(super) fn due(&self) -> Option<Instant> {
        let paces = self
            .waiting
            .iter()
            .filter_map(|dialled| self.paces.get(&dialled.domid));
        paces.map(|pace| pace.until).min()
    }

    /// Connects to what is asked for, without waiting.
    ///
    /// # Errors
    ///
    /// The system's, if nobody is there.
    pub(super) fn connect(&self, dialled: &Dialled) -> io::Result<OwnedFd> {
        let place = self.places.get(&(dialled.domid, dialled.key));
        let place = place.ok_or(io::ErrorKind::NotFound)?;
        connect_to(&socket_of(place, dialled.port))
    }
}

/// Where the program listens that has `port`.
fn socket_of(place: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(place);
    name.push(format!("_{port}"));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;

    const KEY: EntryKey = EntryKey {
        form: EntryForm::File,
        devid: 0,
    };

    fn dialled(domid: u16, number: u64) -> Dialled {
        Dialled {
            domid,
            key: KEY,
            number,
            port: 52,
            tries: 0,
        }
    }

    #[test]
    fn a_guest_has_its_share_and_no_other_guest_waits_for_it() {
        let mut dialling = Dialling::default();
        let now = Instant::now();
        for number in 0..MOST as u64 {
            dialling.ask(dialled(1, number)).unwrap();
        }
        assert_eq!(dialling.ask(dialled(1, 0)), Err(TooMany));
        dialling.ask(dialled(2, 7)).unwrap();
        let mut had = Vec::new();
        had.extend(std::iter::from_fn(|| dialling.next(now)));
        let expected: Vec<_> = (0..IN_A_PERIOD as u64)
            .map(|number| dialled(1, number))
            .collect();
        assert_eq!(had[..IN_A_PERIOD], expected);
        assert_eq!(had[IN_A_PERIOD..], [dialled(2, 7)]);
        assert_eq!(dialling.due(), Some(now + PERIOD));
        assert!(!dialling.admits(1, now) && dialling.admits(2, now));
        // In their order, but for one that was not taken: the others do not wait for that.
        let later = |periods| now + periods * PERIOD;
        let next = dialling.next(later(1)).unwrap();
        assert_eq!(next, dialled(1, IN_A_PERIOD as u64));
        assert!(dialling.put_back(next));
        assert_eq!(dialling.next(later(1)), None);
        let next = dialling.next(later(2)).unwrap();
        assert_eq!(next, dialled(1, IN_A_PERIOD as u64 + 1));
        let last = Dialled {
            tries: TRIES - 1,
            ..next
        };
        assert!(!dialling.put_back(last));
        // One that its worker has not taken is answered some time.
        dialling.wait(last);
        assert_eq!(dialling.waiting.back(), Some(&last));
        let now = later(2);
        dialling.forget((1, KEY));
        assert_eq!(
            (dialling.next(now + 3 * PERIOD), dialling.due()),
            (None, None)
        );
    }

    #[test]
    fn a_port_has_its_socket() {
        let socket = socket_of(Path::new("/run/ivi.vsock"), u32::MAX);
        assert_eq!(socket, Path::new("/run/ivi.vsock_4294967295"));
        let mut dialling = Dialling::default();
        let error = dialling.connect(&dialled(1, 0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("v");
        dialling.have((1, KEY), Some(place.clone()));
        assert!(dialling.connect(&dialled(1, 0)).is_err());
        let _listener = std::os::unix::net::UnixListener::bind(socket_of(&place, 52)).unwrap();
        assert!(dialling.connect(&dialled(1, 0)).is_ok());
        dialling.end((1, KEY));
        assert!(dialling.connect(&dialled(1, 0)).is_err());
    }
}
