//! Entries that libxl wants closed: from being asked for until libxl can be told.
//!
//! A worker gives an entry up first. Transfers that a worker left that was killed before may be under way still: libxl
//! would give the disk to somebody whom an old write then hits.

use crate::ctl::report::ClosingReport;
use crate::toolstack::libxl::EntryKey;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The wait between looks at what is under way: nothing tells of its end.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The closing entries of one guest.
#[derive(Debug, Default)]
pub(super) struct ClosingEntries {
    entries: BTreeMap<EntryKey, Closing>,
    look_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct Closing {
    /// Its worker has given it up.
    given_up: bool,
    /// That something is under way has been logged.
    logged: bool,
    /// Where the guest had it.
    base: Option<u64>,
}

impl ClosingEntries {
    /// A worker is asked to give `key` up, which the guest has at `base`.
    pub(super) fn begin(&mut self, key: EntryKey, base: Option<u64>) {
        let before = self.entries.remove(&key);
        let base = base.or(before.and_then(|before| before.base));
        let closing = Closing {
            base,
            ..Closing::default()
        };
        self.entries.insert(key, closing);
    }

    /// What another worker is to be asked to give up: what the one before has not. Entries that were made again, and that
    /// the worker before had (`is_served`), have nothing to do with those that they follow.
    pub(super) fn not_given_up(&mut self, is_served: impl Fn(EntryKey) -> bool) -> Vec<EntryKey> {
        self.entries.retain(|key, _| !is_served(*key));
        let entries = self.entries.iter();
        let kept = entries.filter(|(_, closing)| !closing.given_up);
        kept.map(|(key, _)| *key).collect()
    }

    /// A worker says that it has given `key` up, which counts if it was asked to.
    pub(super) fn gave_up(&mut self, key: EntryKey) {
        if let Some(closing) = self.entries.get_mut(&key) {
            closing.given_up = true;
        }
    }

    /// The entries that are closed now, which are looked at again until [`ClosingEntries::end`]; and those that are not
    /// because something is under way, each once. `is_known` tells of an entry that was made again: that is another one,
    /// and not closed. `is_held` tells whether transfers of an entry are under way.
    pub(super) fn closed(
        &mut self,
        is_known: impl Fn(EntryKey) -> bool,
        is_held: impl Fn(EntryKey) -> bool,
        now: Instant,
    ) -> (Vec<EntryKey>, Vec<EntryKey>) {
        // Its worker has the lock that would be waited for.
        self.entries
            .retain(|key, closing| !closing.given_up || !is_known(*key));
        let (mut closed, mut held) = (Vec::new(), Vec::new());
        for (key, closing) in &mut self.entries {
            if !closing.given_up {
                continue;
            }
            if !is_held(*key) {
                closed.push(*key);
            } else if !std::mem::replace(&mut closing.logged, true) {
                held.push(*key);
            }
        }
        let waits = self.entries.values().any(|closing| closing.given_up);
        self.look_at = waits.then(|| now + LOOK_AGAIN);
        (closed, held)
    }

    /// Those that are not closed yet.
    pub(super) fn report(&self) -> impl Iterator<Item = ClosingReport> {
        let entries = self.entries.iter();
        entries.map(|(key, closing)| ClosingReport {
            key: *key,
            base: closing.base,
        })
    }

    /// When to look again.
    pub(super) fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    /// libxl has been told that `key` is closed.
    pub(super) fn end(&mut self, key: EntryKey) {
        self.entries.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;

    const KEY: EntryKey = EntryKey {
        form: EntryForm::Disk,
        devid: 51712,
    };

    /// What is closed, and what is told of as held, of an entry that is `known` and whose disk is `held`.
    fn looked(closing: &mut ClosingEntries, known: bool, held: bool) -> (bool, bool) {
        let (closed, told) = closing.closed(|_| known, |_| held, Instant::now());
        (closed == [KEY], told == [KEY])
    }

    #[test]
    fn an_entry_is_closed_when_it_is_given_up_and_nothing_is_under_way() {
        let mut closing = ClosingEntries::default();
        closing.gave_up(KEY);
        assert_eq!(
            looked(&mut closing, false, false),
            (false, false),
            "nobody asked"
        );
        closing.begin(KEY, None);
        assert_eq!(looked(&mut closing, false, false), (false, false));
        assert_eq!(closing.look_at(), None, "its worker will say");
        closing.gave_up(KEY);
        assert_eq!(looked(&mut closing, false, true), (false, true));
        assert_eq!(
            looked(&mut closing, false, true),
            (false, false),
            "told once"
        );
        assert!(closing.look_at().is_some());
        // Until libxl has been told: xenstored may refuse.
        for _ in 0..2 {
            assert_eq!(looked(&mut closing, false, false), (true, false));
        }
        closing.end(KEY);
        assert_eq!(looked(&mut closing, false, false), (false, false));
        assert_eq!(closing.look_at(), None);
    }

    #[test]
    fn an_entry_that_was_made_again_is_not_closed() {
        let mut closing = ClosingEntries::default();
        closing.begin(KEY, None);
        closing.gave_up(KEY);
        assert_eq!(looked(&mut closing, true, true), (false, false));
        assert_eq!(
            looked(&mut closing, false, false),
            (false, false),
            "forgotten"
        );
    }

    #[test]
    fn the_next_worker_gives_up_what_the_last_one_has_not() {
        let mut closing = ClosingEntries::default();
        for (given_up, served, asked) in [
            (false, false, true),
            (true, false, false),
            (false, true, false),
            (true, true, false),
        ] {
            closing.begin(KEY, None);
            if given_up {
                closing.gave_up(KEY);
            }
            let expected: &[_] = if asked { &[KEY] } else { &[] };
            assert_eq!(
                closing.not_given_up(|_| served),
                expected,
                "{given_up} {served}"
            );
        }
    }
}
