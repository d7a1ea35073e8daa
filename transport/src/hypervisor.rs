//! What a hypervisor must do for us. Small on purpose: a second one should fit.

use std::io;
use std::os::fd::BorrowedFd;
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};

/// One guest, as its hypervisor shows it.
pub trait Hypervisor {
    /// The next access of the guest that waits for an answer.
    fn next_trap(&mut self) -> Option<Trap<'_>>;

    /// Readable when traps may wait. It is drained by [`Hypervisor::clear_events`].
    fn events(&self) -> BorrowedFd<'_>;

    /// Takes note of the events so far; traps that came with them are found by
    /// [`Hypervisor::next_trap`] afterwards.
    ///
    /// # Errors
    ///
    /// The system's.
    fn clear_events(&mut self) -> io::Result<()>;

    /// Has the guest's accesses to `range` delivered here, for as long as the guest lives.
    ///
    /// # Errors
    ///
    /// The hypervisor's: somebody else has the range, or the guest is gone.
    fn claim(&mut self, range: MmioRange) -> io::Result<()>;

    /// An interrupt of the guest; `number` counts as the guest's interrupt controller does.
    fn interrupt_line(&self, number: u32) -> Box<dyn InterruptLine>;

    /// A device's access to the guest's memory.
    fn guest_access(&self, mode: AddressMode) -> Box<dyn GuestAccess>;
}

/// An edge-triggered interrupt line.
pub trait InterruptLine {
    /// # Errors
    ///
    /// The hypervisor's: no such line, or the guest is gone.
    fn raise(&self) -> io::Result<()>;
}

/// Guest-physical addresses that a device answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioRange {
    pub base: u64,
    pub len: u64,
}

impl MmioRange {
    /// The offset of `address` in the range, if it lies there.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        address
            .checked_sub(self.base)
            .filter(|offset| *offset < self.len)
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.offset_of(other.base).is_some() || other.offset_of(self.base).is_some()
    }
}

/// Bytes of one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    One = 1,
    Two = 2,
    Four = 4,
    Eight = 8,
}

impl Width {
    pub fn new(bytes: u32) -> Option<Self> {
        match bytes {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            4 => Some(Self::Four),
            8 => Some(Self::Eight),
            _ => None,
        }
    }

    pub fn bytes(self) -> usize {
        self as usize
    }
}

/// What the guest is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapRequest {
    Read {
        address: u64,
        width: Width,
    },
    Write {
        address: u64,
        width: Width,
        value: u64,
    },
    /// The guest's memory map changed: forget what is cached of it (`IOREQ_TYPE_INVALIDATE`).
    Invalidate,
    /// Something that no virtio-mmio device understands.
    Unknown,
}

/// Takes the answer to a trap.
pub trait Respond {
    /// Lets vCPU `vcpu` go on; `value` is what it reads, if it reads.
    fn respond(&mut self, vcpu: usize, value: u64);
}

/// An access that holds a vCPU of the guest up until it is answered. A trap that is dropped unanswered is
/// answered with zero, so that no path leaves the vCPU waiting for ever.
#[must_use = "the guest's vCPU waits for the answer"]
pub struct Trap<'a> {
    request: TrapRequest,
    vcpu: usize,
    respond: &'a mut dyn Respond,
    value: u64,
}

impl<'a> Trap<'a> {
    pub fn new(request: TrapRequest, vcpu: usize, respond: &'a mut dyn Respond) -> Self {
        Self {
            request,
            vcpu,
            respond,
            value: 0,
        }
    }

    pub fn request(&self) -> TrapRequest {
        self.request
    }

    /// Answers a read with `value`; only as many bytes as the guest reads count.
    pub fn answer(mut self, value: u64) {
        self.value = value;
    }

    /// Answers what needs no value.
    pub fn done(self) {
        self.answer(0);
    }
}

impl Drop for Trap<'_> {
    fn drop(&mut self) {
        self.respond.respond(self.vcpu, self.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Answers(Vec<(usize, u64)>);

    impl Respond for Answers {
        fn respond(&mut self, vcpu: usize, value: u64) {
            self.0.push((vcpu, value));
        }
    }

    #[test]
    fn a_trap_is_answered_once_on_every_path() {
        let mut answers = Answers::default();
        Trap::new(TrapRequest::Unknown, 0, &mut answers).answer(7);
        Trap::new(TrapRequest::Unknown, 1, &mut answers).done();
        drop(Trap::new(TrapRequest::Unknown, 2, &mut answers));
        assert_eq!(answers.0, [(0, 7), (1, 0), (2, 0)]);
    }

    #[test]
    fn ranges_know_their_ends() {
        let range = MmioRange {
            base: 0x200,
            len: 0x200,
        };
        assert_eq!(range.offset_of(0x3ff), Some(0x1ff));
        assert_eq!(
            (range.offset_of(0x400), range.offset_of(0x1ff)),
            (None, None)
        );
        assert!(range.overlaps(&MmioRange {
            base: 0x3ff,
            len: 1
        }));
        assert!(range.overlaps(&MmioRange {
            base: 0,
            len: 0x1000
        }));
        assert!(!range.overlaps(&MmioRange {
            base: 0x400,
            len: 1
        }));
    }
}
