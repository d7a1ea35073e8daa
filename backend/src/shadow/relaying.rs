//! One request in the region: where its buffers are there, and what is copied.

use super::ring::Part;
use crate::engine::PageRun;
use crate::virtqueue::Request;
use smallvec::SmallVec;
use std::ops::Range;
use xen_virtio_guest_mapping::{CopyOp, Direction, PAGE_SIZE};

/// Shorter buffers share a page; others begin at one, as direct I/O wants them.
const SMALL_BUFFER: u32 = 512;
const SMALL_ALIGNMENT: usize = 16;

/// A request with its buffers in the region.
pub(super) struct Relaying {
    pub(super) request: Request,
    pub(super) parts: SmallVec<[Part; 4]>,
    pub(super) run: PageRun,
    pub(super) pages: usize,
    /// There is nothing for the back-end to read: it may keep the request for as long as it likes.
    pub(super) receives: bool,
    /// Counts the requests of all queues as they were offered.
    pub(super) order: u64,
    /// What the back-end has written.
    pub(super) written: u32,
    /// Its copies.
    pub(super) copies: Range<usize>,
}

/// Where the buffers of a request are to be, from the beginning of its pages.
pub(super) struct Plan {
    pub(super) parts: SmallVec<[Part; 4]>,
    pub(super) bytes: usize,
}

impl Plan {
    pub(super) fn of(request: &Request) -> Self {
        let readable = request.readable.iter().map(|buffer| (buffer.len, false));
        let writable = request.writable.iter().map(|buffer| (buffer.len, true));
        let buffers = readable.chain(writable);
        let small = |len: u32| (len as usize).next_multiple_of(SMALL_ALIGNMENT);
        let smalls = buffers.clone().filter(|(len, _)| *len < SMALL_BUFFER);
        let smalls: usize = smalls.map(|(len, _)| small(len)).sum();
        let (mut next_small, mut next_page) = (0, smalls.next_multiple_of(PAGE_SIZE));
        let parts = buffers
            .map(|(len, writable)| {
                let (next, step) = match len < SMALL_BUFFER {
                    true => (&mut next_small, small(len)),
                    false => (&mut next_page, (len as usize).next_multiple_of(PAGE_SIZE)),
                };
                let place = *next;
                *next += step;
                Part {
                    place,
                    len,
                    writable,
                }
            })
            .collect();
        Self {
            parts,
            bytes: next_page,
        }
    }

    pub(super) fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }

    /// The request in `run`, with what copies it in added to `copies`.
    pub(super) fn relay(
        mut self,
        request: Request,
        run: PageRun,
        pages: usize,
        receives: bool,
        copies: &mut Vec<CopyOp>,
    ) -> Relaying {
        for part in &mut self.parts {
            part.place += run.start();
        }
        let mut relaying = Relaying {
            request,
            parts: self.parts,
            run,
            pages,
            receives,
            order: 0,
            written: 0,
            copies: 0..0,
        };
        relaying.plan_in(copies);
        relaying
    }
}

impl Relaying {
    /// Adds to `copies` what takes the readable buffers in.
    pub(super) fn plan_in(&mut self, copies: &mut Vec<CopyOp>) {
        let first = copies.len();
        for (buffer, part) in self.request.readable.iter().zip(&self.parts) {
            let local = part.place..part.place + part.len as usize;
            copies.push(CopyOp::new(Direction::FromGuest, buffer.address, local));
        }
        self.copies = first..copies.len();
    }

    /// Adds to `copies` what takes the first `written` bytes of the writable buffers to the guest.
    pub(super) fn plan_out(&mut self, written: u32, copies: &mut Vec<CopyOp>) {
        self.written = written;
        let first = copies.len();
        let mut left = written;
        let writable = self.parts.iter().filter(|part| part.writable);
        for (buffer, part) in self.request.writable.iter().zip(writable) {
            let len = part.len.min(left);
            if len == 0 {
                break;
            }
            let local = part.place..part.place + len as usize;
            copies.push(CopyOp::new(Direction::ToGuest, buffer.address, local));
            left -= len;
        }
        self.copies = first..copies.len();
    }
}
