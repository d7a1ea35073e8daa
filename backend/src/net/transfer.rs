//! Frames, both ways.

use super::interrupts::Moderation;
use super::receive::Source;
use super::send::Wire;
use super::{Interface, Net, Role};
use crate::device::{Activity, DeviceError};
use crate::engine::TransferError;
use crate::tuning::{SENT_BYTES, STEPS_PER_FRAME_LOOK};
use xen_virtio_guest_mapping::GuestAccess;

/// What was moved by a queue at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// The driver's requests that are done.
    pub(super) requests: u32,
    pub(super) bytes: usize,
    /// There may be more to be moved at once.
    pub(super) has_more: bool,
}

impl Moved {
    /// For how many frames it counts where the driver waits to hear of frames: one that sends much waits for its memory.
    fn weight(self) -> u32 {
        let large = u32::try_from(self.bytes / SENT_BYTES).unwrap_or(u32::MAX);
        self.requests.max(large)
    }
}

impl Net {
    /// Moves frames, both ways, and shows the driver those that it has. True if it is to be interrupted.
    pub(super) fn transfer(
        &mut self,
        access: &mut dyn GuestAccess,
    ) -> Result<(bool, Activity), DeviceError> {
        if self.unlooked.is_multiple_of(STEPS_PER_FRAME_LOOK) {
            for pair in &mut self.pairs {
                pair.receiver.look();
            }
        }
        self.unlooked = self.unlooked.wrapping_add(1);
        let (mut interrupt, mut activity) = (false, Activity::Idle);
        let count = self.queues.count();
        self.first = (self.first + 1) % count;
        for step in 0..count {
            let index = (self.first + step) % count;
            let moved = self.serve(index, access);
            if let Ok(Moved { has_more: true, .. }) = moved {
                activity = Activity::Working;
            }
            match moved {
                Ok(Moved { requests: 0, .. }) => {}
                Ok(moved) => {
                    let queue = self.queues.get(index).expect("it was served");
                    let is_wanted = queue.publish()?;
                    let size = queue.size();
                    let (shown, rule) = match (self.controls.moderation[index], self.role(index)) {
                        (None, Role::Sends(_)) => (moved.weight(), Moderation::of_sent(size)),
                        (asked, _) => (moved.requests, asked.unwrap_or_default()),
                    };
                    interrupt |= self.interrupts[index].shown(shown, is_wanted, rule);
                    activity = Activity::Working;
                    self.unlooked = 0;
                }
                Err(TransferError::Dom0(fault)) => self.lack = Some(fault),
                Err(TransferError::Device(error)) => return Err(error),
            }
        }
        Ok((interrupt, activity))
    }

    /// Moves frames by one queue.
    fn serve(
        &mut self,
        index: usize,
        access: &mut dyn GuestAccess,
    ) -> Result<Moved, TransferError> {
        let role = self.role(index);
        let (offloads, is_up) = (self.offloads(), self.controls.is_up);
        let Some(queue) = self.queues.get(index) else {
            return Ok(Moved::default());
        };
        let counters = &mut self.counters;
        match role {
            Role::Receives(pair) => {
                let is_used = pair < usize::from(self.controls.pairs);
                let pair = &mut self.pairs[pair];
                let mut source = Source {
                    interface: &mut *pair.interface,
                    filter: &self.controls.filter,
                    offloads,
                    is_up,
                    limiter: &mut self.receives,
                };
                match is_used || pair.receiver.is_busy() {
                    true => pair.receiver.step(queue, &mut source, counters, access),
                    false => Ok(Moved::default()),
                }
            }
            Role::Sends(pair) => {
                let pair = &mut self.pairs[pair];
                let interface: &mut dyn Interface = &mut *pair.interface;
                let wire = Wire {
                    interface: is_up.then_some(interface),
                    features: self.features,
                };
                let limiter = &mut self.sends;
                pair.sender.step(queue, wire, limiter, counters, access)
            }
            Role::Controls | Role::Nothing => Ok(Moved::default()),
        }
    }
}
