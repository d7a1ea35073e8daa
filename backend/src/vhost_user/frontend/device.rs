//! What the transport asks of it.

use super::{Frontend, Told};
use crate::device::{Activity, Device, DeviceError, Identity, Interest, RequestCounters, Step};
use crate::virtqueue::{QueueError, QueueIndex, QueueStart, Unfinished};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;
use xen_virtio_guest_mapping::GuestAccess;

impl Device for Frontend {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.config.read(offset, to);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if !self.config.write(offset, data) {
            return;
        }
        self.keep.drivers(self.config.written());
        if self.config.to_tell().is_none() {
            return;
        }
        if let Some(session) = &mut self.session
            && session.is_usable()
            && let Err(error) = session.write_config(offset, data)
        {
            self.lose(Some(&error));
        }
    }

    fn update(&mut self) -> bool {
        if let Some(brought) = self.link.brought.take() {
            self.begin(brought);
        }
        false
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.features = start.features;
        self.queues
            .start(index, start, Unfinished::Repeat, access)?;
        self.looks = true;
        Ok(())
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        let mut worked = self.converse()?;
        match self.relay.take_out(&mut self.queues, access, true) {
            Ok(out) => worked |= out,
            Err(error) => {
                // What other queues have is shown before the driver is told to reset.
                let failed = self.of_relay(error);
                let published = self.publish();
                failed?;
                step.interrupt |= published?;
                worked = true;
            }
        }
        let (told, is_serving) = (&self.told, self.is_serving);
        let taken = self.relay.take_in(&mut self.queues, access, &mut |queue| {
            if let Told::Start(doorbell) = &told[queue]
                && is_serving
            {
                doorbell.ring();
            }
        });
        worked |= taken?;
        step.interrupt |= self.publish()?;
        step.config_changed = std::mem::take(&mut self.config_changed);
        step.activity = match worked {
            true => Activity::Working,
            false if self.relay.expected() > 0 => Activity::Waiting,
            false => Activity::Idle,
        };
        Ok(step)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        let mut step = Step::default();
        // What was held back.
        match self.relay.take_out(&mut self.queues, access, false) {
            Ok(false) => {}
            Ok(true) => {
                step.interrupt = self.publish()?;
                step.activity = Activity::Working;
                return Ok(step);
            }
            Err(error) => self.of_relay(error)?,
        }
        // Whoever looks for events has taken those that have told of it so far.
        self.looks = true;
        let conversed = self.converse()?;
        if self.relay.prepare_sleep(&mut self.queues)? || conversed {
            step.activity = Activity::Working;
        }
        // Whatever wakes us may be the back-end.
        self.looks = true;
        Ok(step)
    }

    fn try_again_at(&self) -> Option<Instant> {
        let session = self.session.as_ref();
        let due = session.and_then(|session| session.due());
        let again = self.again.as_ref().map(|(at, _)| *at);
        let times = [due, again, self.relay.try_again_at()];
        times.into_iter().flatten().min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        add(self.events.as_fd(), Interest::Readable);
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.queues.close(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.queues.stop(index);
        self.relay.stop(index);
        let queue = index.get();
        if !matches!(self.told[queue], Told::Start(_)) {
            return;
        }
        self.told[queue] = Told::Stop;
        self.looks = true;
        if let Some(session) = &mut self.session
            && let Err(error) = session.stop(queue)
        {
            self.lose(Some(&error));
        }
    }

    fn retire(&mut self) {
        self.lose(None);
        self.again = None;
    }

    fn settle(&mut self) -> bool {
        // Nobody prepares the sleep of a device without a driver: what has told of an answer may be taken already.
        let session = self.session.as_ref();
        self.looks |= session.is_some_and(|session| session.due().is_some() || session.has_more());
        // No driver relies on anything now.
        let _ = self.converse();
        self.told.iter().all(|told| !matches!(told, Told::Stop))
    }

    fn reset(&mut self) {
        self.features = 0;
        self.stuck = 0;
        self.config.forget_written();
        self.keep.drivers(&[]);
    }

    fn warning(&self) -> Option<String> {
        let absence = self.absence.as_ref();
        let absent =
            absence.map(|why| format!("its back-end is away: {why}; the guest waits for it"));
        absent.or_else(|| self.relay.warning())
    }

    fn counters(&self) -> RequestCounters {
        self.relay.counters()
    }

    fn metrics(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("connections", self.connections);
    }
}
