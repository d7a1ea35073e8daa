//! Any state file: a device that goes on from it, or an error; and a reset that ends all that it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xen_virtio_backend::{StateArea, StateCell};
use xen_virtio_dom0_tools::guest_state::FIRST_FORMAT_BYTES;
use xen_virtio_fuzz::{BYTES, Numbers, area_of, driver, make_device, reset_device, run_device};
use xen_virtio_guest_io::{BlkRequest, RawQueue};

/// Where the parts of the first device are in a file: its name, its registers, and the journals of its two queues.
struct Places {
    bytes: usize,
    name: (usize, usize),
    registers: (usize, usize),
    journals: usize,
    /// Bytes from one journal to the next.
    journal: usize,
}

/// The layout of this version, with the directory of records behind the header, and the first one.
const LAYOUTS: [Places; 2] = [
    Places {
        bytes: BYTES,
        name: (11776, 520),
        registers: (12416, 1160),
        journals: 13632,
        journal: 4160,
    },
    Places {
        bytes: FIRST_FORMAT_BYTES,
        name: (4096, 1024),
        registers: (2 * 4096, 4096),
        journals: 3 * 4096,
        journal: 12 << 10,
    },
];

/// Requests that the journals may speak of are at these descriptors.
const HEADS: [u16; 3] = [0, 3, 6];

thread_local! {
    static AREAS: [StateArea; 2] = {
        let driver = driver();
        // The first memory of the guest, so that the seeds know its references.
        let queue = RawQueue::new(&driver, 16);
        for head in HEADS {
            BlkRequest::new(&driver, 0, 0, 512, true).describe(&queue, head);
        }
        LAYOUTS.each_ref().map(|layout| area_of(layout.bytes))
    };
}

fn cell(area: &StateArea, (offset, len): (usize, usize), numbers: &mut Numbers<'_>) {
    let len_of_text = usize::from(numbers.u16()).min(numbers.0.len());
    let (text, rest) = numbers.0.split_at(len_of_text);
    numbers.0 = rest;
    let _ = StateCell::new(area.part(offset, len)).store(text);
}

fuzz_target!(|input: &[u8]| {
    AREAS.with(|areas| {
        let mut numbers = Numbers(input);
        let how = numbers.byte();
        let which = usize::from(how >> 3 & 1);
        let (area, places) = (&areas[which], &LAYOUTS[which]);
        area.part(0, places.journals + 2 * places.journal).zero();
        // Each part gets its place.
        assert!(make_device(area.clone()));
        if how & 1 != 0 {
            cell(area, places.name, &mut numbers);
        }
        cell(area, places.registers, &mut numbers);
        if how & 2 != 0 {
            // Anywhere, the words that say how long something is among them.
            for _ in 0..numbers.byte() % 8 {
                let word = usize::from(numbers.u16()) % (places.journals / 8);
                area.store(word, numbers.u64());
            }
        }
        while !numbers.is_empty() {
            let queue = usize::from(numbers.byte() & 1);
            let word = usize::from(numbers.u16()) % 513;
            let value = if how & 4 == 0 {
                numbers.u16().into()
            } else {
                numbers.u64()
            };
            area.part(places.journals + queue * places.journal, places.journal)
                .store(word, value);
        }
        if make_device(area.clone()) {
            run_device();
            reset_device();
        }
    });
});
