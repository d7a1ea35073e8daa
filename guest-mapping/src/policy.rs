//! Which of a guest's pages a device may touch.

use crate::access::AccessError;
use crate::address::{Page, Segments};
use vm_memory::GuestAddress;

/// How a guest names its memory, as its xl configuration says (`grant_usage`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressMode {
    /// Only pages that the guest granted to the backend.
    Grants,
    /// Any frame of the guest that a descriptor names.
    Frames,
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
    /// [`AccessError::Address`] for an address that names no page, [`AccessError::Refused`] for one of
    /// the kind that this device was not configured for.
    pub fn admit(&self, address: GuestAddress, len: usize) -> Result<Segments, AccessError> {
        let segments = Segments::new(address, len)?;
        let admitted = match crate::BusAddress::try_from(address)?.page {
            Page::Grant(_) => self.mode == AddressMode::Grants,
            Page::Frame(_) => self.mode == AddressMode::Frames,
        };
        if admitted {
            Ok(segments)
        } else {
            Err(AccessError::Refused {
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
            assert!(matches!(
                policy.admit(no, 1),
                Err(AccessError::Refused { .. })
            ));
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
