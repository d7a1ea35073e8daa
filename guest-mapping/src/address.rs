//! The addresses that a guest puts in descriptors and queue registers.
//!
//! A guest whose device tree puts the device behind Xen's grant IOMMU sends grant references, in the
//! form that Linux's `drivers/xen/grant-dma-ops.c` gives them: bit 63 set, the reference above the page
//! offset. Any other guest sends guest-physical addresses.

use vm_memory::GuestAddress;

/// Bytes in a grant and in a frame: Xen's page size, on every Arm guest.
pub const PAGE_SIZE: usize = 4096;
const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Marks a bus address as a grant reference (`XEN_GRANT_DMA_ADDR_OFF` in Linux).
pub const GRANT_BIT: u64 = 1 << 63;

/// A grant reference: an index into the guest's grant table (`grant_ref_t`, `xen/grant_table.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gref(pub u32);

/// A guest frame number: a guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

/// One page of a guest, by whichever name the guest gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Page {
    Grant(Gref),
    Frame(Gfn),
}

impl Page {
    /// The page `count` pages on: a contiguous buffer has consecutive references or frames.
    fn forward(self, count: u64) -> Option<Self> {
        match self {
            Self::Grant(Gref(reference)) => {
                let next = u64::from(reference).checked_add(count)?;
                u32::try_from(next).ok().map(|next| Self::Grant(Gref(next)))
            }
            Self::Frame(Gfn(gfn)) => gfn.checked_add(count).map(|next| Self::Frame(Gfn(next))),
        }
    }
}

/// A decoded bus address: a page and a byte offset below [`PAGE_SIZE`] in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusAddress {
    pub page: Page,
    pub offset: usize,
}

/// An address that names no page, whatever the guest has granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("address {0:#x} holds a grant reference of more than 32 bits")]
    WideReference(u64),
    #[error("{len} bytes from address {address:#x} run past the last grant or frame")]
    PastTheEnd { address: u64, len: usize },
}

impl TryFrom<GuestAddress> for BusAddress {
    type Error = AddressError;

    fn try_from(GuestAddress(raw): GuestAddress) -> Result<Self, AddressError> {
        let number = (raw & !GRANT_BIT) >> PAGE_SHIFT;
        let page = if raw & GRANT_BIT == 0 {
            Page::Frame(Gfn(number))
        } else {
            Page::Grant(Gref(
                u32::try_from(number).map_err(|_| AddressError::WideReference(raw))?,
            ))
        };
        Ok(Self {
            page,
            offset: usize::try_from(raw % PAGE_SIZE as u64).expect("below PAGE_SIZE"),
        })
    }
}

impl From<BusAddress> for GuestAddress {
    fn from(BusAddress { page, offset }: BusAddress) -> Self {
        let base = match page {
            Page::Grant(Gref(reference)) => GRANT_BIT | (u64::from(reference) << PAGE_SHIFT),
            Page::Frame(Gfn(gfn)) => gfn << PAGE_SHIFT,
        };
        Self(base | offset as u64)
    }
}

/// A piece of a buffer that lies in one page: `offset + len <= PAGE_SIZE`, `len > 0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub page: Page,
    pub offset: usize,
    pub len: usize,
}

/// The segments of a buffer, in order; their lengths add up to the buffer's.
#[derive(Clone, Debug)]
pub struct Segments {
    first: BusAddress,
    len: usize,
    done: usize,
}

impl Segments {
    /// # Errors
    ///
    /// [`AddressError`] if the address, or the end of the buffer, names no page.
    pub fn new(address: GuestAddress, len: usize) -> Result<Self, AddressError> {
        let first = BusAddress::try_from(address)?;
        let past_the_end = || AddressError::PastTheEnd {
            address: address.0,
            len,
        };
        let end = first.offset.checked_add(len).ok_or_else(past_the_end)?;
        if len > 0 {
            first
                .page
                .forward(((end - 1) / PAGE_SIZE) as u64)
                .filter(|page| !matches!(page, Page::Frame(Gfn(gfn)) if *gfn >= GRANT_BIT >> PAGE_SHIFT))
                .ok_or_else(past_the_end)?;
        }
        Ok(Self {
            first,
            len,
            done: 0,
        })
    }

    /// The page that the buffer begins in; the others are of its kind.
    pub fn first_page(&self) -> Page {
        self.first.page
    }

    /// How many pages the buffer touches.
    pub fn pages(&self) -> usize {
        if self.len == 0 {
            return 0;
        }
        (self.first.offset + self.len).div_ceil(PAGE_SIZE)
    }
}

impl Iterator for Segments {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.done == self.len {
            return None;
        }
        let position = self.first.offset + self.done;
        let offset = position % PAGE_SIZE;
        let len = (PAGE_SIZE - offset).min(self.len - self.done);
        let page = self.first.page.forward((position / PAGE_SIZE) as u64)?;
        self.done += len;
        Some(Segment { page, offset, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_grant_address_is_what_linux_makes_of_a_reference() {
        let address = GuestAddress(GRANT_BIT | (0x123 << 12) | 0x45);
        let decoded = BusAddress::try_from(address).unwrap();
        assert_eq!(
            decoded,
            BusAddress {
                page: Page::Grant(Gref(0x123)),
                offset: 0x45
            }
        );
    }

    #[test]
    fn a_reference_of_33_bits_is_refused() {
        let raw = GRANT_BIT | (1 << 44);
        assert_eq!(
            BusAddress::try_from(GuestAddress(raw)),
            Err(AddressError::WideReference(raw))
        );
    }

    #[test]
    fn a_buffer_may_end_at_the_last_reference_and_not_behind_it() {
        let last = GuestAddress::from(BusAddress {
            page: Page::Grant(Gref(u32::MAX)),
            offset: 0,
        });
        assert_eq!(Segments::new(last, PAGE_SIZE).unwrap().count(), 1);
        assert!(Segments::new(last, PAGE_SIZE + 1).is_err());
    }

    #[test]
    fn a_frame_buffer_never_runs_into_the_grants() {
        let last = GuestAddress(GRANT_BIT - PAGE_SIZE as u64);
        assert!(Segments::new(last, PAGE_SIZE).is_ok());
        assert!(Segments::new(last, PAGE_SIZE + 1).is_err());
    }

    proptest! {
        #[test]
        fn decoding_is_total_and_inverts(raw: u64) {
            if let Ok(decoded) = BusAddress::try_from(GuestAddress(raw)) {
                prop_assert!(decoded.offset < PAGE_SIZE);
                prop_assert_eq!(GuestAddress::from(decoded), GuestAddress(raw));
            }
        }

        #[test]
        fn segments_cover_the_buffer_once(raw: u64, len in 0usize..100_000) {
            if let Ok(segments) = Segments::new(GuestAddress(raw), len) {
                let pages = segments.pages();
                let all: Vec<_> = segments.collect();
                prop_assert_eq!(all.iter().map(|s| s.len).sum::<usize>(), len);
                prop_assert_eq!(all.len(), pages);
                prop_assert!(all.iter().all(|s| s.len > 0 && s.offset + s.len <= PAGE_SIZE));
                prop_assert!(all.iter().skip(1).all(|s| s.offset == 0));
            }
        }

        #[test]
        fn any_length_is_judged(raw: u64, len: usize) {
            let _ = Segments::new(GuestAddress(raw), len);
        }
    }
}
