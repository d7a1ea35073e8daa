//! The ioreq server of one guest: where its accesses arrive.

use super::abi::{self, Ioreq, IoservId};
use super::dm_op;
use super::evtchn::EventChannels;
use crate::hypervisor::{Hypervisor, InterruptLine, MmioRange, Respond, Trap, TrapRequest, Width};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::{Rc, Weak};
use std::sync::atomic::Ordering;
use xen_sys::evtchn_port_t;
use xen_virtio_guest_mapping::xen::{
    Domid, FrameAccess, FrameCache, GrantAccess, Mapping, Privcmd,
};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess, PAGE_SIZE};

/// vCPUs whose slots a page has room for.
const MAX_VCPUS: usize = PAGE_SIZE / size_of::<Ioreq>();

/// Why a guest cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    #[error(
        "Xen gives no ioreq server for the guest: is Xen built with CONFIG_IOREQ_SERVER, and has the guest \
         not ended?"
    )]
    Create(#[source] io::Error),
    #[error("the guest's number of vCPUs cannot be read")]
    Vcpus(#[source] io::Error),
    #[error("the guest has {0} vCPUs, and one ioreq page has room for {MAX_VCPUS}")]
    TooManyVcpus(u32),
    #[error("the ioreq server's page cannot be mapped")]
    Page(#[source] io::Error),
    #[error("the ioreq server cannot be enabled")]
    Enable(#[source] io::Error),
    #[error("the event channel of vCPU {vcpu} cannot be bound")]
    Bind { vcpu: u32, source: io::Error },
}

/// The last domid that a guest can have (`DOMID_FIRST_RESERVED` in `xen/xen.h`), which Xen gives out last.
const LAST_DOMID: u16 = 0x7fef;

/// Whether Xen is built with ioreq servers. `privcmd` is an open `/dev/xen/privcmd`; nothing is changed.
///
/// # Errors
///
/// What keeps that from being told.
pub fn ioreq_servers_exist(privcmd: File) -> io::Result<bool> {
    // On Arm, Xen without CONFIG_IOREQ_SERVER has no device-model operations.
    match dm_op::vcpus(&Privcmd::new(privcmd, Domid(LAST_DOMID))) {
        Err(error) => match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(true),
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        },
        Ok(_) => Ok(true),
    }
}

/// A guest on Xen.
///
/// Dropping it leaves the ioreq server in place: without one, the next access of a running guest would be a
/// data abort. Xen takes it away with the domain.
pub struct XenGuest {
    privcmd: Rc<Privcmd>,
    gntdev: Rc<File>,
    /// The guest's frames that stay mapped, for as long as it has a device that is granted nothing.
    frames: RefCell<Weak<RefCell<FrameCache>>>,
    evtchn: EventChannels,
    page: Mapping,
    server: IoservId,
    /// Our end of each vCPU's event channel.
    ports: Vec<evtchn_port_t>,
    /// vCPUs whose requests a process that has died had taken and not answered.
    inherited: Vec<usize>,
    /// The vCPU to look at first, so that none is always last.
    next: usize,
}

impl XenGuest {
    /// Makes an ioreq server for a guest. It stays, for [`XenGuest::open`], as long as the guest lives.
    ///
    /// # Errors
    ///
    /// [`XenError::Create`].
    pub fn create_server(privcmd: &Privcmd) -> Result<IoservId, XenError> {
        dm_op::create_ioreq_server(privcmd).map_err(XenError::Create)
    }

    /// The guest that `privcmd` and `evtchn` are for, with its ioreq server. What an earlier process, which
    /// must have ended, had of it is taken over, with the accesses that it did not answer.
    ///
    /// # Errors
    ///
    /// [`XenError`].
    pub fn open(
        privcmd: Privcmd,
        gntdev: File,
        evtchn: EventChannels,
        server: IoservId,
    ) -> Result<Self, XenError> {
        let vcpus = dm_op::vcpus(&privcmd).map_err(XenError::Vcpus)?;
        if vcpus as usize > MAX_VCPUS {
            return Err(XenError::TooManyVcpus(vcpus));
        }
        let page = privcmd.map_ioreq_page(server).map_err(XenError::Page)?;
        dm_op::enable_ioreq_server(&privcmd, server).map_err(XenError::Enable)?;
        let mut guest = Self {
            privcmd: Rc::new(privcmd),
            gntdev: Rc::new(gntdev),
            frames: RefCell::default(),
            evtchn,
            page,
            server,
            ports: Vec::new(),
            inherited: Vec::new(),
            next: 0,
        };
        for vcpu in 0..vcpus {
            let remote = guest.slot(vcpu as usize).vp_eport.load(Ordering::Acquire);
            let port = guest
                .evtchn
                .bind(remote)
                .map_err(|source| XenError::Bind { vcpu, source })?;
            guest.ports.push(port);
            if guest.slot(vcpu as usize).is_taken() {
                guest.inherited.push(vcpu as usize);
            }
            // It may have died between an answer and telling of it. Once too often does no harm.
            let _ = guest.evtchn.notify(port);
        }
        Ok(guest)
    }

    /// How many vCPUs the guest has.
    pub fn vcpus(&self) -> usize {
        self.ports.len()
    }

    /// Whether the guest still lives. Xen takes the ioreq server of a dying domain away. Asking pauses
    /// the guest for a moment.
    pub fn is_alive(&self) -> bool {
        // Enabling what is enabled changes nothing.
        match dm_op::enable_ioreq_server(&self.privcmd, self.server) {
            Ok(()) => true,
            Err(error) => !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
        }
    }

    fn slot(&self, vcpu: usize) -> &Ioreq {
        let offset = vcpu * size_of::<Ioreq>();
        assert!(offset + size_of::<Ioreq>() <= PAGE_SIZE);
        // SAFETY: within the page, which is mapped as long as `self` lives and aligned to its size. Every
        // field that Xen writes is atomic.
        unsafe { self.page.start().add(offset).cast().as_ref() }
    }
}

impl Hypervisor for XenGuest {
    fn next_trap(&mut self) -> Option<Trap<'_>> {
        let count = self.ports.len();
        let next_ready = || {
            (0..count)
                .map(|step| (self.next + step) % count)
                .find(|&vcpu| self.slot(vcpu).take())
        };
        // What was taken stays taken: Xen ends a guest whose request goes back to an earlier state. Whatever
        // it was, doing it twice is doing it once.
        let vcpu = match self.inherited.last() {
            Some(&vcpu) => vcpu,
            None => next_ready()?,
        };
        self.inherited.pop();
        self.next = vcpu + 1;
        let request = self.slot(vcpu).request();
        Some(Trap::new(request, vcpu, self))
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.evtchn.as_fd()
    }

    fn clear_events(&mut self) -> io::Result<()> {
        self.evtchn.clear()
    }

    fn claim(&mut self, range: MmioRange) -> io::Result<()> {
        match dm_op::map_range(&self.privcmd, self.server, range) {
            // The server, which is nobody else's, has had the range since an earlier process.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    fn interrupt_line(&self, number: u32) -> Box<dyn InterruptLine> {
        Box::new(XenLine {
            privcmd: Rc::clone(&self.privcmd),
            number,
        })
    }

    fn guest_access(&self, mode: AddressMode) -> Box<dyn GuestAccess> {
        match mode {
            AddressMode::Grants => Box::new(GrantAccess::new(
                Rc::clone(&self.gntdev),
                self.privcmd.domid(),
            )),
            AddressMode::Frames => {
                let mut frames = self.frames.borrow_mut();
                let cache = frames.upgrade().unwrap_or_default();
                *frames = Rc::downgrade(&cache);
                Box::new(FrameAccess::new(Rc::clone(&self.privcmd), cache))
            }
        }
    }
}

impl Respond for XenGuest {
    fn respond(&mut self, vcpu: usize, value: u64) {
        self.slot(vcpu).answer(value);
        if let Err(error) = self.evtchn.notify(self.ports[vcpu]) {
            // Only a guest that is gone has no event channel; it waits for nothing.
            tracing::debug!("vCPU {vcpu} cannot be notified: {error}");
        }
    }
}

impl Ioreq {
    /// Takes the request in the slot, if there is one that nobody has taken.
    pub fn take(&self) -> bool {
        let flags = self.flags.load(Ordering::Acquire);
        let ready = flags & abi::IOREQ_STATE_MASK == abi::STATE_IOREQ_READY;
        if ready {
            self.set_state(flags, abi::STATE_IOREQ_INPROCESS);
        }
        ready
    }

    /// Whether somebody has taken the request in the slot, and not answered it.
    pub fn is_taken(&self) -> bool {
        self.flags.load(Ordering::Acquire) & abi::IOREQ_STATE_MASK == abi::STATE_IOREQ_INPROCESS
    }

    fn set_state(&self, flags: u8, state: u8) {
        self.flags
            .store(flags & !abi::IOREQ_STATE_MASK | state, Ordering::Release);
    }

    /// What the guest waits for.
    pub fn request(&self) -> TrapRequest {
        let flags = self.flags.load(Ordering::Relaxed);
        let address = self.addr.load(Ordering::Relaxed);
        let value = self.data.load(Ordering::Relaxed);
        let width = Width::new(self.size.load(Ordering::Relaxed));
        match (self.kind.load(Ordering::Relaxed), width) {
            (abi::IOREQ_TYPE_INVALIDATE, _) => TrapRequest::Invalidate,
            // Arm never sends a pointer to the data, or a repeat count: both are x86's.
            (abi::IOREQ_TYPE_COPY, Some(width)) if flags & abi::IOREQ_DATA_IS_PTR == 0 => {
                if flags & abi::IOREQ_DIR_READ != 0 {
                    TrapRequest::Read { address, width }
                } else {
                    TrapRequest::Write {
                        address,
                        width,
                        value,
                    }
                }
            }
            _ => TrapRequest::Unknown,
        }
    }

    /// Hands the slot back to Xen.
    pub fn answer(&self, value: u64) {
        let flags = self.flags.load(Ordering::Relaxed);
        if flags & abi::IOREQ_DIR_READ != 0 {
            self.data.store(value, Ordering::Relaxed);
        }
        self.set_state(flags, abi::STATE_IORESP_READY);
    }
}

struct XenLine {
    privcmd: Rc<Privcmd>,
    number: u32,
}

impl InterruptLine for XenLine {
    /// A level of 1 is a rising edge to Xen's vGIC, which keeps no level for an edge-triggered line: it
    /// needs no falling edge in between (Xen, `vgic_inject_irq`).
    fn raise(&self) -> io::Result<()> {
        dm_op::raise_irq(&self.privcmd, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

    fn slot(kind: u8, flags: u8, size: u32) -> Ioreq {
        Ioreq {
            addr: AtomicU64::new(0x0200_0050),
            data: AtomicU64::new(0x1234),
            count: AtomicU32::new(1),
            size: AtomicU32::new(size),
            vp_eport: AtomicU32::new(5),
            pad0: 0,
            flags: AtomicU8::new(flags),
            kind: AtomicU8::new(kind),
        }
    }

    #[test]
    fn a_slot_becomes_the_request_it_holds() {
        let ready = abi::STATE_IOREQ_READY;
        let address = 0x0200_0050;
        let width = Width::Four;
        for (kind, flags, size, expected) in [
            (
                abi::IOREQ_TYPE_COPY,
                ready | abi::IOREQ_DIR_READ,
                4,
                TrapRequest::Read { address, width },
            ),
            (
                abi::IOREQ_TYPE_COPY,
                ready,
                4,
                TrapRequest::Write {
                    address,
                    width,
                    value: 0x1234,
                },
            ),
            (abi::IOREQ_TYPE_COPY, ready, 3, TrapRequest::Unknown),
            (
                abi::IOREQ_TYPE_COPY,
                ready | abi::IOREQ_DATA_IS_PTR,
                4,
                TrapRequest::Unknown,
            ),
            (
                abi::IOREQ_TYPE_INVALIDATE,
                ready,
                0,
                TrapRequest::Invalidate,
            ),
            (2, ready, 4, TrapRequest::Unknown),
        ] {
            assert_eq!(slot(kind, flags, size).request(), expected);
        }
    }

    #[test]
    fn a_slot_is_taken_once_and_answered_in_place() {
        let slot = slot(
            abi::IOREQ_TYPE_COPY,
            abi::STATE_IOREQ_READY | abi::IOREQ_DIR_READ,
            4,
        );
        assert!(slot.take());
        assert!(!slot.take());
        assert!(slot.is_taken());
        slot.answer(7);
        assert!(!slot.is_taken());
        assert_eq!(slot.data.load(Ordering::Relaxed), 7);
        assert_eq!(
            slot.flags.load(Ordering::Relaxed),
            abi::STATE_IORESP_READY | abi::IOREQ_DIR_READ
        );
        assert!(!slot.take());
    }
}
