//! What is said with another process.

use super::super::conversation::{Conversation, Driver, Ended, Heard, Offer};
use super::super::doorbell::Doorbell;
use super::super::message::{self, PROTOCOL_FEATURES, Request, protocol};
use super::{Owed, Session, SessionError, of_system};
use crate::shadow::{Region, RingPlaces};
use rustix::fs::fstat;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

impl Conversation for Session {
    fn is_usable(&self) -> bool {
        self.is_usable
    }

    fn offer(&self) -> &Offer {
        &self.offer
    }

    fn due(&self) -> Option<Instant> {
        self.due
    }

    fn has_more(&self) -> bool {
        self.has_more
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>)) {
        add(self.connection.as_fd());
        if let Some(requests) = &self.requests {
            add(requests.as_fd());
        }
    }

    fn connection(&self) -> Option<u64> {
        connection_name(self.connection.as_fd()).ok()
    }

    /// It ends for the supervisor too, which closes the socket that it has.
    fn end(mut self: Box<Self>) -> Ended {
        self.connection.end();
        Ended::Closed
    }

    fn hear(&mut self) -> Result<Option<Heard>, SessionError> {
        while let Some(message) = self.connection.receive()? {
            if let Some(heard) = self.take(&message)? {
                return Ok(Some(heard));
            }
        }
        self.take_requests()?;
        if let Some(due) = self.due
            && due <= Instant::now()
            && let Some(owed) = self.owed.front()
        {
            let (_, request) = owed.request();
            return Err(SessionError::Late { request });
        }
        Ok(None)
    }

    fn prepare(&mut self, driver: Driver, region: &Region, base: u64) -> Result<(), SessionError> {
        let features = driver.of_back_end | PROTOCOL_FEATURES | 1 << VIRTIO_F_VERSION_1;
        let command = (Request::SetFeatures, "SET_FEATURES");
        self.command(command, &message::number(features), None)?;
        if !std::mem::replace(&mut self.knows_memory, true) {
            let table = message::memory_table(base, region.bytes() as u64);
            let command = (Request::SetMemTable, "SET_MEM_TABLE");
            self.command(command, &table, Some(region.file().as_fd()))?;
        }
        Ok(())
    }

    fn start(
        &mut self,
        index: usize,
        rings: &RingPlaces,
        base: u64,
        call: BorrowedFd<'_>,
    ) -> Result<Doorbell, SessionError> {
        let ring = number_of(index);
        let (doorbell, kick) = Doorbell::new().map_err(of_system)?;
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
        self.command(command, &descriptor, Some(kick.as_fd()))?;
        let enabled = message::ring_state(ring, 1);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &enabled, None)?;
        Ok(doorbell)
    }

    fn started(&mut self) -> Result<(), SessionError> {
        let ready = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK;
        self.set_status(ready)?;
        self.ask(Owed::Serving, &[])
    }

    fn stop(&mut self, index: usize) -> Result<(), SessionError> {
        let ring = number_of(index);
        let disabled = message::ring_state(ring, 0);
        let command = (Request::SetVringEnable, "SET_VRING_ENABLE");
        self.command(command, &disabled, None)?;
        self.ask(Owed::LetGo(index), &message::ring_state(ring, 0))
    }

    fn reset(&mut self) -> Result<(), SessionError> {
        self.set_status(0)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), SessionError> {
        if !self.reads_config() {
            return Ok(());
        }
        let offset = u32::try_from(offset).expect("in the configuration space");
        // Whether it obeys is between it and the driver.
        self.send(Request::SetConfig, &message::config(offset, data), None)
    }
}

impl Session {
    fn set_status(&mut self, status: u32) -> Result<(), SessionError> {
        if self.protocol & protocol::STATUS == 0 {
            return Ok(());
        }
        let command = (Request::SetStatus, "SET_STATUS");
        self.command(command, &message::number(status.into()), None)
    }
}

/// What tells a connection from others that there are: the number of its socket, which every descriptor of it has.
///
/// # Errors
///
/// The system's.
pub fn connection_name(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(fstat(socket)?.st_ino)
}

fn number_of(index: usize) -> u32 {
    u32::try_from(index).expect("few queues")
}
