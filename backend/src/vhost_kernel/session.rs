//! What is said with the kernel. It answers at once, and what it has answered is heard like what others say.

use super::abi::{VhostMemory, VhostVringAddr, VhostVringState};
use super::calls::{self, VringFile, VringState};
use super::{Kernel, Kind};
use crate::shadow::{Region, RingPlaces};
use crate::tap;
use crate::vhost_user::{
    Class, Conversation, Doorbell, Driver, Ended, Heard, Offer, SessionError, of_system,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::VolatileSlice;

/// The queues of either device that the kernel serves: the first two.
const SERVED: usize = 2;

pub(crate) struct KernelSession {
    kernel: Option<Kernel>,
    offer: Offer,
    heard: VecDeque<Heard>,
    /// Where the region's first byte is in this process.
    memory: u64,
    /// The queues that are set up, and those that are served.
    is_set_up: [bool; SERVED],
    is_served: [bool; SERVED],
    /// Written by the kernel when it does not get on with a queue.
    errors: OwnedFd,
}

impl KernelSession {
    /// Begins with a device of `class`, whose queues will be in this process's memory.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub(crate) fn begin(mut kernel: Kernel, class: &Class) -> Result<Self, (SessionError, Kernel)> {
        let begun = begin(&mut kernel, class);
        match begun {
            Ok((offer, errors)) => Ok(Self {
                kernel: Some(kernel),
                heard: VecDeque::from([Heard::Offer(offer.clone())]),
                offer,
                memory: 0,
                is_set_up: [false; SERVED],
                is_served: [false; SERVED],
                errors,
            }),
            Err(error) => Err((error, kernel)),
        }
    }

    fn kernel(&self) -> &Kernel {
        self.kernel.as_ref().expect("it has not ended")
    }

    fn device(&self) -> BorrowedFd<'_> {
        self.kernel().device.as_fd()
    }

    /// Has the kernel serve what is set up. vhost-vsock does so for all of its queues or none.
    fn serve(&mut self) -> Result<(), SessionError> {
        let kernel = self.kernel.as_ref().expect("it has not ended");
        let device = kernel.device.as_fd();
        match &kernel.kind {
            Kind::Vsock => {
                let all = self.is_set_up.iter().all(|set_up| *set_up);
                if all && !self.is_served[0] {
                    let running = calls::set_running(device, true);
                    refused("VHOST_VSOCK_SET_RUNNING", running)?;
                    self.is_served = [true; SERVED];
                }
            }
            Kind::Net { tap } => {
                for queue in 0..SERVED {
                    if self.is_set_up[queue] && !self.is_served[queue] {
                        let tap = Some(tap.as_fd());
                        let attached =
                            calls::set_vring_file(device, VringFile::Tap, number(queue), tap);
                        refused("VHOST_NET_SET_BACKEND", attached)?;
                        self.is_served[queue] = true;
                    }
                }
            }
        }
        Ok(())
    }

    /// Has the kernel serve queue `queue` no more: when this returns it touches nothing of it.
    fn halt(&mut self, queue: usize) -> Result<(), SessionError> {
        if !self.is_served[queue] {
            return Ok(());
        }
        match &self.kernel().kind {
            Kind::Vsock => {
                let halted = calls::set_running(self.device(), false);
                refused("VHOST_VSOCK_SET_RUNNING", halted)?;
                self.is_served = [false; SERVED];
            }
            Kind::Net { .. } => {
                let halted =
                    calls::set_vring_file(self.device(), VringFile::Tap, number(queue), None);
                refused("VHOST_NET_SET_BACKEND", halted)?;
                self.is_served[queue] = false;
            }
        }
        Ok(())
    }

    fn halt_all(&mut self) -> Result<(), SessionError> {
        // Each of them, whatever became of the one before.
        let halted: [_; SERVED] = std::array::from_fn(|queue| self.halt(queue));
        halted.into_iter().collect()
    }
}

impl Conversation for KernelSession {
    fn is_usable(&self) -> bool {
        true
    }

    fn offer(&self) -> &Offer {
        &self.offer
    }

    fn due(&self) -> Option<Instant> {
        None
    }

    fn has_more(&self) -> bool {
        !self.heard.is_empty()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>)) {
        add(self.errors.as_fd());
    }

    fn connection(&self) -> Option<u64> {
        None
    }

    fn end(mut self: Box<Self>) -> Ended {
        // What is not served no more may write to the region: then the device is closed, which ends that.
        match (self.halt_all(), self.kernel.take()) {
            (Ok(()), Some(kernel)) => Ended::Again(kernel),
            (Err(_), _) | (_, None) => Ended::Closed,
        }
    }

    fn hear(&mut self) -> Result<Option<Heard>, SessionError> {
        let mut count = [0; 8];
        match read(&self.errors, &mut count) {
            Ok(_) => return Err(SessionError::Stuck),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(of_system(errno.into())),
        }
        Ok(self.heard.pop_front())
    }

    fn prepare(&mut self, driver: Driver, region: &Region, base: u64) -> Result<(), SessionError> {
        let features = driver.of_back_end | 1 << VIRTIO_F_VERSION_1;
        refused(
            "VHOST_SET_FEATURES",
            calls::set_features(self.device(), features),
        )?;
        if let Kind::Net { tap } = &self.kernel().kind {
            let offloads = tap::offloads(driver.accepted);
            refused("TUNSETOFFLOAD", tap::set_offloads(tap.as_fd(), offloads))?;
        }
        self.memory = address(&region.memory());
        let memory = VhostMemory {
            nregions: 1,
            guest_phys_addr: base,
            memory_size: region.bytes() as u64,
            userspace_addr: self.memory,
            ..VhostMemory::default()
        };
        refused(
            "VHOST_SET_MEM_TABLE",
            calls::set_memory(self.device(), memory),
        )
    }

    fn start(
        &mut self,
        index: usize,
        rings: &RingPlaces,
        _base: u64,
        call: BorrowedFd<'_>,
    ) -> Result<Doorbell, SessionError> {
        if index >= SERVED {
            return Ok(Doorbell::nobodys());
        }
        let device = self.device();
        let ring = number(index);
        let state = |num| VhostVringState { index: ring, num };
        let size = calls::set_vring(device, VringState::Num, state(rings.size.into()));
        refused("VHOST_SET_VRING_NUM", size)?;
        let base = calls::set_vring(device, VringState::Base, state(0));
        refused("VHOST_SET_VRING_BASE", base)?;
        let at = |place: usize| self.memory + place as u64;
        let addresses = VhostVringAddr {
            index: ring,
            desc_user_addr: at(rings.descriptors),
            used_user_addr: at(rings.used),
            avail_user_addr: at(rings.available),
            ..VhostVringAddr::default()
        };
        let addressed = calls::set_vring_address(device, addresses);
        refused("VHOST_SET_VRING_ADDR", addressed)?;
        let (doorbell, kick) = Doorbell::kernels().map_err(of_system)?;
        for (request, name, file) in [
            (VringFile::Error, "VHOST_SET_VRING_ERR", self.errors.as_fd()),
            (VringFile::Call, "VHOST_SET_VRING_CALL", call),
            (VringFile::Kick, "VHOST_SET_VRING_KICK", kick.as_fd()),
        ] {
            refused(
                name,
                calls::set_vring_file(device, request, ring, Some(file)),
            )?;
        }
        self.is_set_up[index] = true;
        Ok(doorbell)
    }

    fn started(&mut self) -> Result<(), SessionError> {
        self.serve()?;
        self.heard.push_back(Heard::Serving);
        Ok(())
    }

    fn stop(&mut self, queue: usize) -> Result<(), SessionError> {
        let mut next = 0;
        if queue < SERVED {
            self.halt(queue)?;
            self.is_set_up[queue] = false;
            let base = calls::vring_base(self.device(), number(queue));
            next = refused("VHOST_GET_VRING_BASE", base)?;
        }
        let next = u16::try_from(next & 0xffff).expect("16 bits");
        self.heard.push_back(Heard::LetGo { queue, next });
        Ok(())
    }

    fn reset(&mut self) -> Result<(), SessionError> {
        Ok(())
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) -> Result<(), SessionError> {
        Ok(())
    }
}

impl Drop for KernelSession {
    fn drop(&mut self) {
        if self.kernel.is_some() {
            // The region is unmapped next. An error leaves that to the device's being closed.
            let _ = self.halt_all();
        }
    }
}

fn begin(kernel: &mut Kernel, class: &Class) -> Result<(Offer, OwnedFd), SessionError> {
    let device = kernel.device.as_fd();
    if !kernel.is_owned {
        refused("VHOST_SET_OWNER", calls::set_owner(device))?;
        kernel.is_owned = true;
    }
    let features = refused("VHOST_GET_FEATURES", calls::features(kernel.device.as_fd()))?;
    let needed = 1 << VIRTIO_F_VERSION_1;
    if features & needed == 0 {
        return Err(SessionError::Needs(needed));
    }
    let offer = Offer {
        features,
        queues: class.queues,
        config: Vec::new(),
    };
    let errors = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Ok((offer, errors.map_err(|errno| of_system(errno.into()))?))
}

fn refused<T>(call: &'static str, result: io::Result<T>) -> Result<T, SessionError> {
    result.map_err(|source| SessionError::Kernel { call, source })
}

fn address(memory: &VolatileSlice<'_>) -> u64 {
    memory.ptr_guard().as_ptr().addr() as u64
}

fn number(queue: usize) -> u32 {
    u32::try_from(queue).expect("few queues")
}
