//! The hypervisor of a simulated guest, which is a thread whose accesses trap.

use crate::faults::Fault;
use crate::memory::SimMemory;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};
use xen_virtio_transport::{
    Hypervisor, InterruptLine, MmioRange, Respond, Trap, TrapRequest, Width,
};

/// The backend's side of a simulated guest.
pub struct SimHypervisor {
    shared: Arc<Shared>,
    ranges: Vec<MmioRange>,
}

/// The guest's side: what its CPUs do. Clones are more CPUs of the same guest.
#[derive(Clone)]
pub struct SimGuest {
    shared: Arc<Shared>,
}

struct Shared {
    memory: SimMemory,
    /// `None` once nobody answers any more.
    traps: Mutex<Option<TrapQueue>>,
    events: EventFd,
    interrupts: Mutex<HashMap<u32, u64>>,
    interrupted: Condvar,
}

/// A trap, and where its answer goes.
type Waiting = (TrapRequest, SyncSender<u64>);

#[derive(Default)]
struct TrapQueue {
    waiting: VecDeque<Waiting>,
    /// The one that was handed out last, until it is answered.
    taken: Option<Waiting>,
}

impl Shared {
    fn traps(&self) -> MutexGuard<'_, Option<TrapQueue>> {
        self.traps.lock().expect("no holder of this lock panics")
    }

    fn interrupts(&self) -> MutexGuard<'_, HashMap<u32, u64>> {
        self.interrupts
            .lock()
            .expect("no holder of this lock panics")
    }
}

/// A guest with `frames` pages of memory, and the hypervisor that runs it.
///
/// # Errors
///
/// If this machine has not the memory or file descriptors.
pub fn simulate(frames: usize) -> io::Result<(SimHypervisor, SimGuest)> {
    let shared = Arc::new(Shared {
        memory: SimMemory::new(frames)?,
        traps: Mutex::new(Some(TrapQueue::default())),
        events: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        interrupts: Mutex::default(),
        interrupted: Condvar::new(),
    });
    let hypervisor = SimHypervisor {
        shared: Arc::clone(&shared),
        ranges: Vec::new(),
    };
    Ok((hypervisor, SimGuest { shared }))
}

impl SimGuest {
    pub fn memory(&self) -> &SimMemory {
        &self.shared.memory
    }

    /// Reads a device register, and waits for the answer as a vCPU would. All ones if nobody answers.
    pub fn read(&self, address: u64, width: Width) -> u64 {
        let value = self
            .trap(TrapRequest::Read { address, width })
            .unwrap_or(u64::MAX);
        value & (u64::MAX >> (64 - 8 * width.bytes()))
    }

    /// Writes a device register, and waits until the write has been carried out.
    pub fn write(&self, address: u64, width: Width, value: u64) {
        let _ = self.trap(TrapRequest::Write {
            address,
            width,
            value,
        });
    }

    /// Any trap, as Xen might deliver it. `None` if nobody answers.
    pub fn trap(&self, request: TrapRequest) -> Option<u64> {
        let (sender, receiver) = sync_channel(1);
        {
            let mut traps = self.shared.traps();
            traps.as_mut()?.waiting.push_back((request, sender));
        }
        self.shared.events.write(1).ok()?;
        receiver.recv().ok()
    }

    /// The hypervisor's side for a process that follows one that has died: with its traps, those that it
    /// had taken and not answered among them.
    pub fn take_over(&self) -> SimHypervisor {
        if let Some(traps) = self.shared.traps().as_mut()
            && let Some(unanswered) = traps.taken.take()
        {
            traps.waiting.push_front(unanswered);
        }
        SimHypervisor {
            shared: Arc::clone(&self.shared),
            ranges: Vec::new(),
        }
    }

    /// How often line `number` was raised so far.
    pub fn interrupts(&self, number: u32) -> u64 {
        self.shared.interrupts().get(&number).copied().unwrap_or(0)
    }

    /// Waits until line `number` has been raised more than `seen` times. False after `limit`.
    pub fn wait_interrupt(&self, number: u32, seen: u64, limit: Duration) -> bool {
        let quiet = |interrupts: &mut HashMap<u32, u64>| {
            interrupts.get(&number).copied().unwrap_or(0) <= seen
        };
        let (_lines, timeout) = self
            .shared
            .interrupted
            .wait_timeout_while(self.shared.interrupts(), limit, quiet)
            .expect("no holder of this lock panics");
        !timeout.timed_out()
    }
}

impl Hypervisor for SimHypervisor {
    fn next_trap(&mut self) -> Option<Trap<'_>> {
        let request = {
            let mut traps = self.shared.traps();
            let traps = traps.as_mut()?;
            let next = traps.waiting.pop_front()?;
            traps.taken.insert(next).0
        };
        Some(Trap::new(request, 0, self))
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.shared.events.as_fd()
    }

    fn clear_events(&mut self) -> io::Result<()> {
        match self.shared.events.read() {
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn claim(&mut self, range: MmioRange) -> io::Result<()> {
        if self.ranges.iter().any(|other| other.overlaps(&range)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if self.shared.memory.faults().strikes(Fault::Claim) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.ranges.push(range);
        Ok(())
    }

    fn interrupt_line(&self, number: u32) -> Box<dyn InterruptLine> {
        Box::new(SimLine {
            shared: Arc::clone(&self.shared),
            number,
        })
    }

    fn guest_access(&self, mode: AddressMode) -> Box<dyn GuestAccess> {
        Box::new(self.shared.memory.access(mode))
    }
}

impl Drop for SimHypervisor {
    fn drop(&mut self) {
        // A machine that has failed leaves no vCPU waiting.
        *self.shared.traps() = None;
    }
}

impl Respond for SimHypervisor {
    fn respond(&mut self, _vcpu: usize, value: u64) {
        self.shared.memory.faults().step();
        let taken = self
            .shared
            .traps()
            .as_mut()
            .and_then(|traps| traps.taken.take());
        if let Some((_, answer)) = taken {
            // The guest's thread may have gone; then nobody waits.
            let _ = answer.send(value);
        }
    }
}

struct SimLine {
    shared: Arc<Shared>,
    number: u32,
}

impl InterruptLine for SimLine {
    fn raise(&self) -> io::Result<()> {
        self.shared.memory.faults().step();
        if self.shared.memory.faults().strikes(Fault::Interrupt) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        *self.shared.interrupts().entry(self.number).or_default() += 1;
        self.shared.interrupted.notify_all();
        Ok(())
    }
}
