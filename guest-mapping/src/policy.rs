//! Which of a guest's pages a device may touch.

use crate::access::AccessError;
use crate::address::{AddressError, Page, Segments};
use vm_memory::GuestAddress;

/// How a guest names its memory, as its xl configuration says (`grant_usage`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressMode {
    /// Only pages that the guest granted to the backend.
    Grants,
    /// Any frame of the guest that a descriptor names.
    Frames,
}

/// Why an address that a guest chose is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("{}", explain(*.address, *.mode))]
    Kind { address: u64, mode: AddressMode },
}

fn explain(address: u64, mode: AddressMode) -> String {
    match mode {
        AddressMode::Grants => format!(
            "address {address:#x} is not a grant, and this device may touch only granted pages \
             (does the guest's kernel have CONFIG_XEN_VIRTIO? else set grant_usage=0)"
        ),
        AddressMode::Frames => format!(
            "address {address:#x} is a grant, and this device was configured for guest-physical \
             addresses (set grant_usage=1)"
        ),
    }
}

/// What one queue may map for its rings: the largest virtqueue that we offer needs nine pages.
pub const MAX_RING_PAGES: usize = 64;

/// The rule for one device. Every address of the guest passes [`Policy::admit`] once.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub mode: AddressMode,
}

impl Policy {
    /// The pages that a buffer of `len` bytes at `address` lies in.
    ///
    /// # Errors
    ///
    /// [`Refusal`] of an address that names no page, or is not of this device's kind.
    pub fn admit(&self, address: GuestAddress, len: usize) -> Result<Segments, Refusal> {
        let segments = Segments::new(address, len)?;
        let admitted = match segments.first_page() {
            Page::Grant(_) => self.mode == AddressMode::Grants,
            Page::Frame(_) => self.mode == AddressMode::Frames,
        };
        if admitted {
            Ok(segments)
        } else {
            Err(Refusal::Kind {
                address: address.0,
                mode: self.mode,
            })
        }
    }

    /// Like [`Policy::admit`], for memory that stays mapped.
    ///
    /// # Errors
    ///
    /// As there, and [`AccessError::RingTooLarge`] beyond [`MAX_RING_PAGES`].
    pub fn admit_ring(&self, address: GuestAddress, len: usize) -> Result<Segments, AccessError> {
        let segments = self.admit(address, len)?;
        if segments.pages() > MAX_RING_PAGES || len == 0 {
            return Err(AccessError::RingTooLarge {
                address: address.0,
                len,
            });
        }
        Ok(segments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GRANT_BIT;

    #[test]
    fn each_mode_admits_its_own_addresses_only() {
        let grant = GuestAddress(GRANT_BIT | 0x1000);
        let frame = GuestAddress(0x4000_0000);
        for (mode, yes, no) in [
            (AddressMode::Grants, grant, frame),
            (AddressMode::Frames, frame, grant),
        ] {
            let policy = Policy { mode };
            assert!(policy.admit(yes, 1).is_ok());
            assert!(matches!(policy.admit(no, 1), Err(Refusal::Kind { .. })));
        }
    }

    #[test]
    fn a_ring_is_bounded() {
        let policy = Policy {
            mode: AddressMode::Grants,
        };
        let largest = MAX_RING_PAGES * crate::PAGE_SIZE;
        assert!(policy.admit_ring(GuestAddress(GRANT_BIT), largest).is_ok());
        assert!(
            policy
                .admit_ring(GuestAddress(GRANT_BIT), largest + 1)
                .is_err()
        );
        assert!(policy.admit_ring(GuestAddress(GRANT_BIT), 0).is_err());
    }
}
