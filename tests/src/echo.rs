//! A device that gives requests back what they bring, and does none of them twice.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_backend::{
    DeviceType, Failure, Identity, QueueIndex, Request, Scratch, Serve, Unfinished,
};
use xen_virtio_guest_mapping::GuestAccess;

/// Echoes a page at most.
pub struct Echo {
    identity: Identity,
    scratch: Scratch,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Echo {
    /// What it has been brought so far.
    pub fn seen(&self) -> Arc<Mutex<Vec<Vec<u8>>>> {
        Arc::clone(&self.seen)
    }

    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            identity: Identity {
                device_type: DeviceType(0x3f),
                features: 1 << VIRTIO_RING_F_EVENT_IDX,
                queue_sizes: vec![64],
            },
            scratch: Scratch::new()?,
            seen: Arc::default(),
        })
    }
}

impl Serve for Echo {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn unfinished(&self, _queue: QueueIndex) -> Unfinished {
        Unfinished::GiveBack
    }

    fn serve(
        &mut self,
        _queue: usize,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, Failure> {
        if request.readable.len() > Scratch::BYTES.min(request.writable.len()) {
            return Err(Failure::Guest);
        }
        let bytes = self.scratch.read(&request.readable, access)?.to_vec();
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes.clone());
        Ok(self.scratch.write(&bytes, &request.writable, access)?)
    }
}
