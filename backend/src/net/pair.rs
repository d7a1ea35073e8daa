//! Pairs of queues, and the interface that follows what the driver has set.

use super::interface::Interface;
use super::offloads::Offloads;
use super::receive::Receiver;
use super::send::Sender;
use crate::engine::Allowance;
use std::io;
use std::time::{Duration, Instant};

/// Changes of an interface in a second: each holds up others in dom0 who change theirs.
const CHANGES: u64 = 20;
const PERIOD: Duration = Duration::from_millis(50);

/// A receiving and a sending queue, with the queue of the interface that they share.
pub(super) struct Pair {
    pub(super) receiver: Receiver,
    pub(super) sender: Sender,
    pub(super) interface: Box<dyn Interface>,
    /// Whether frames come by it, once that has been said.
    is_used: Option<bool>,
}

impl Pair {
    pub(super) fn new(interface: Box<dyn Interface>) -> io::Result<Self> {
        Ok(Self {
            receiver: Receiver::new()?,
            sender: Sender::new()?,
            interface,
            is_used: None,
        })
    }

    pub(super) fn is_busy(&self) -> bool {
        self.receiver.is_busy() || self.sender.is_busy()
    }
}

/// How the interface follows the driver: some changes at a time, whatever the driver does.
pub(super) struct Following {
    /// What the interface was told that the driver takes: of all its queues.
    offloads: Option<Offloads>,
    changes: Allowance,
    /// There is something to tell it when the time has come.
    is_behind: bool,
}

impl Following {
    pub(super) fn new() -> Self {
        Self {
            offloads: None,
            changes: Allowance::new(CHANGES, PERIOD, Instant::now()),
            is_behind: false,
        }
    }

    /// Has the interface hand over what the driver takes, by the first `used` of `pairs`. Frames that come otherwise meanwhile
    /// are dropped where they must not be seen.
    ///
    /// # Errors
    ///
    /// The interface's.
    pub(super) fn follow(
        &mut self,
        pairs: &mut [Pair],
        offloads: Offloads,
        used: usize,
    ) -> io::Result<()> {
        let is_used = |index: usize| index < used;
        let differs = |(index, pair): (usize, &Pair)| pair.is_used != Some(is_used(index));
        self.is_behind = self.offloads != Some(offloads) || pairs.iter().enumerate().any(differs);
        if !self.is_behind || !self.changes.admits(Instant::now()) {
            return Ok(());
        }
        self.changes.spend(1);
        self.is_behind = false;
        let mut result = Ok(());
        if let Some(first) = pairs.first_mut()
            && self.offloads.replace(offloads) != Some(offloads)
        {
            result = first.interface.set_offloads(offloads.bits());
        }
        for (index, pair) in pairs.iter_mut().enumerate() {
            let is_used = is_used(index);
            if pair.is_used.replace(is_used) != Some(is_used) {
                result = result.and(pair.interface.set_used(is_used));
            }
        }
        result
    }

    /// There is no driver to follow for now.
    pub(super) fn rest(&mut self) {
        self.is_behind = false;
    }

    /// When the interface may be told what it is behind with.
    pub(super) fn next(&self) -> Option<Instant> {
        self.is_behind.then(|| self.changes.next())
    }
}
