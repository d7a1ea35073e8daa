//! What a back-end is told to do.

use super::super::message::{self, PROTOCOL_FEATURES, Request, protocol};
use super::{Owed, Session, SessionError};
use crate::shadow::{Region, RingPlaces};
use std::os::fd::{AsFd, BorrowedFd};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

impl Session {
    /// Tells the back-end what the driver has accepted, and which memory there is, before queues are started.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn prepare(
        &mut self,
        features: u64,
        region: &Region,
        base: u64,
    ) -> Result<(), SessionError> {
        let features = features | PROTOCOL_FEATURES | 1 << VIRTIO_F_VERSION_1;
        let command = (Request::SetFeatures, "SET_FEATURES");
        self.command(command, &message::number(features), None)?;
        if !std::mem::replace(&mut self.knows_memory, true) {
            let table = message::memory_table(base, region.bytes() as u64);
            let command = (Request::SetMemTable, "SET_MEM_TABLE");
            self.command(command, &table, Some(region.file().as_fd()))?;
        }
        Ok(())
    }

    /// Tells the back-end to serve queue `index`, from the beginning of its rings at `rings`: it looks at it when `kick` is
    /// readable, and writes to `call` when it has used something.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn start(
        &mut self,
        index: usize,
        rings: &RingPlaces,
        base: u64,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> Result<(), SessionError> {
        let ring = number_of(index);
        let at = |place: usize| base + place as u64;
        let addresses = message::ring_address(
            ring,
            at(rings.descriptors),
            at(rings.available),
            at(rings.used),
        );
        let size = message::ring_state(ring, rings.size.into());
        for (command, payload) in [
            ((Request::SetVringNum, "SET_VRING_NUM"), size),
            (
                (Request::SetVringBase, "SET_VRING_BASE"),
                message::ring_state(ring, 0),
            ),
            ((Request::SetVringAddr, "SET_VRING_ADDR"), addresses),
        ] {
            self.command(command, &payload, None)?;
        }
        let descriptor = message::ring_descriptor(ring);
        let command = (Request::SetVringCall, "SET_VRING_CALL");
        self.command(command, &descriptor, Some(call))?;
        let command = (Request::SetVringKick, "SET_VRING_KICK");
        self.command(command, &descriptor, Some(kick))?;
        let enabled = message::ring_state(ring, 1);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &enabled, None)
    }

    /// After the last queue was started: [`Heard::Serving`] follows.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn started(&mut self) -> Result<(), SessionError> {
        let ready = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK;
        self.set_status(ready)?;
        self.ask(Owed::Serving, &[])
    }

    fn set_status(&mut self, status: u32) -> Result<(), SessionError> {
        if self.protocol & protocol::STATUS == 0 {
            return Ok(());
        }
        let command = (Request::SetStatus, "SET_STATUS");
        self.command(command, &message::number(status.into()), None)
    }

    /// Tells the back-end to let go of queue `index`: [`Heard::LetGo`] follows.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn stop(&mut self, index: usize) -> Result<(), SessionError> {
        let ring = number_of(index);
        let disabled = message::ring_state(ring, 0);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &disabled, None)?;
        self.ask(Owed::LetGo(index), &message::ring_state(ring, 0))
    }

    /// The driver has reset the device, and the back-end has let go of its queues.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn reset(&mut self) -> Result<(), SessionError> {
        self.set_status(0)
    }

    /// The driver has written `data` at byte `offset` of the configuration space.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(in super::super) fn write_config(
        &mut self,
        offset: usize,
        data: &[u8],
    ) -> Result<(), SessionError> {
        if !self.reads_config() {
            return Ok(());
        }
        let offset = u32::try_from(offset).expect("in the configuration space");
        // Whether it obeys is between it and the driver.
        self.send(Request::SetConfig, &message::config(offset, data), None)
    }
}

fn number_of(index: usize) -> u32 {
    u32::try_from(index).expect("few queues")
}
