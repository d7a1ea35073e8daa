//! What a hostile or broken driver does to rings, descriptors, grants and features: each ends as this list
//! says, and the device works after a reset.

use crate::{BlkRequest, Buffer, Driver, NEXT, NO_STATUS, Negotiated, RawQueue, WRITE};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use xen_virtio_guest_mapping::{GRANT_BIT, Gref, PAGE_SIZE};
use xen_virtio_transport::Register;

const SIZE: u16 = 64;
/// A reference that nobody has granted.
const NO_GRANT: u64 = GRANT_BIT | 0xfff_f000;
/// The bit of `InterruptStatus` for a change of configuration (virtio 1.3, 4.2.2).
const CONFIGURATION: u32 = 2;

/// How a malformed thing ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The device says DEVICE_NEEDS_RESET, with a configuration interrupt.
    NeedsReset,
    /// The request ends with an error status.
    ErrorStatus,
}

/// A thing to do with a running queue and a good request at descriptor 0 that was not offered yet.
type Mischief = fn(&Driver, &mut RawQueue, &BlkRequest);

const INDIRECT: u16 = 4;
const _: () = assert!(INDIRECT as u32 == VRING_DESC_F_INDIRECT);

/// What the rings and descriptors of a running queue can be made to say.
const RINGS: &[(&str, End, Mischief)] = &[
    (
        "a chain begins beyond the table",
        End::NeedsReset,
        |_, queue, _| queue.offer(SIZE),
    ),
    (
        "a chain begins at the largest index",
        End::NeedsReset,
        |_, queue, _| queue.offer(u16::MAX),
    ),
    (
        "a chain goes on beyond the table",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, NEXT, SIZE);
            queue.offer(0);
        },
    ),
    (
        "a chain loops to its head",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, NEXT, 0);
            queue.offer(0);
        },
    ),
    (
        "a chain loops further on",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.status.address(), 1, NEXT | WRITE, 1);
            queue.offer(0);
        },
    ),
    (
        "the available index runs ahead",
        End::NeedsReset,
        |_, queue, _| queue.set_available_index(SIZE + 1),
    ),
    (
        "the available index goes backwards",
        End::NeedsReset,
        |_, queue, _| queue.set_available_index(u16::MAX),
    ),
    (
        "a chain that was not given back is made available again",
        End::NeedsReset,
        |_, queue, _| queue.offer_together(&[0, 0]),
    ),
    (
        "an indirect table was not negotiated",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, INDIRECT, 0);
            queue.offer(0);
        },
    ),
    (
        "an indirect descriptor within a chain",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(1, request.data.address(), 16, NEXT | INDIRECT, 2);
            queue.offer(0);
        },
    ),
    (
        "readable after writable",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.data.address(), 16, NEXT | WRITE, 1);
            queue.set_descriptor(1, request.header.address(), 16, NEXT, 2);
            queue.offer(0);
        },
    ),
    (
        "more than 2^32 bytes in a chain",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), u32::MAX, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "nowhere to put the status",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, 0, 0);
            queue.offer(0);
        },
    ),
    (
        "only empty descriptors",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 0, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status lies in no grant",
        End::NeedsReset,
        |_, queue, _| {
            queue.set_descriptor(2, NO_GRANT, 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status lies in a frame that was not granted",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.status.frame_address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status is granted read-only",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.header.address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status's grant was ended",
        End::NeedsReset,
        |driver, queue, _| {
            queue.set_descriptor(2, ended(driver), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the header's grant was ended",
        End::ErrorStatus,
        |driver, queue, _| {
            queue.set_descriptor(0, ended(driver), 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the data's grant was ended",
        End::ErrorStatus,
        |driver, queue, _| {
            queue.set_descriptor(1, ended(driver), 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data is granted read-only",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(1, request.header.address(), 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the header lies in no grant",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(0, NO_GRANT, 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header lies in a frame that was not granted",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.frame_address(), 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header is at address 0",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(0, 0, 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header is too short",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 15, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "there is no header",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.status.address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the data runs beyond its grants",
        End::ErrorStatus,
        |driver, queue, _| {
            let last = last_of_grants(driver);
            queue.set_descriptor(1, last.address(), 8 << 10, NEXT | WRITE, 2);
            queue.offer(0);
            // The device may use it until the next start.
            std::mem::forget(last);
        },
    ),
    (
        "the data wraps around the address space",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data's reference has more than 32 bits",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(1, GRANT_BIT | 1 << 44, 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data is 4 GiB long",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(1, request.data.address(), u32::MAX - 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
];

/// The address of memory that is not granted any more.
fn ended(driver: &Driver) -> u64 {
    let buffer = driver.buffer(512, true);
    let address = buffer.address();
    buffer.revoke();
    address
}

/// A page that is granted, and the next reference after whose is not. Which references a guest has beside each other depends on all
/// that it has granted before.
fn last_of_grants(driver: &Driver) -> Buffer {
    let mut pages: BTreeMap<Gref, Buffer> = BTreeMap::new();
    loop {
        let page = driver.buffer(PAGE_SIZE, true);
        pages.insert(page.grant(), page);
        let mut grants = pages.keys().map(|grant| grant.0);
        let beside = grants.find(|grant| pages.contains_key(&Gref(grant + 1)));
        let Some(last) = beside.map(Gref) else {
            continue;
        };
        let next = pages.remove(&Gref(last.0 + 1)).expect("it is there");
        let last = pages.remove(&last).expect("it is there");
        drop(pages);
        next.revoke();
        return last;
    }
}

/// A good request, alone.
///
/// # Errors
///
/// If it does not end well.
pub fn works(driver: &Driver) -> Result<()> {
    let mut queue = driver.start(SIZE);
    let request = BlkRequest::new(driver, VIRTIO_BLK_T_IN, 0, 512, true);
    let ended = request.perform(driver, &mut queue);
    ensure!(ended == (0, 513), "a good request ended with {ended:?}");
    Ok(())
}

/// Does everything that is listed here to the device, which is left reset. Returns how many things that is.
///
/// # Errors
///
/// What did not end as it should.
pub fn do_all(driver: &Driver) -> Result<usize> {
    for (what, end, mischief) in RINGS {
        do_to_ring(driver, *end, *mischief).context(*what)?;
        works(driver).with_context(|| format!("after a reset: {what}"))?;
    }
    let queues = bad_queues(driver)?;
    let features = bad_features(driver)?;
    driver.write(Register::Status, 0);
    Ok(RINGS.len() + queues + features)
}

fn do_to_ring(driver: &Driver, end: End, mischief: Mischief) -> Result<()> {
    let mut queue = driver.start(SIZE);
    let request = BlkRequest::new(driver, VIRTIO_BLK_T_IN, 0, 512, true);
    request.describe(&queue, 0);
    mischief(driver, &mut queue, &request);
    driver.notify(0);
    match end {
        End::NeedsReset => {
            ensure!(
                driver.wait(|| driver.needs_reset()),
                "no DEVICE_NEEDS_RESET"
            );
            let causes = driver.read(Register::InterruptStatus);
            ensure!(causes & CONFIGURATION != 0, "no configuration interrupt");
            ensure!(request.status.read() == [NO_STATUS], "a status");
            // The broken queue is left alone, also when it is kicked again.
            driver.notify(0);
            ensure!(queue.used_index() == 0, "a used buffer");
        }
        End::ErrorStatus => {
            ensure!(driver.wait(|| queue.used_index() == 1), "never completed");
            ensure!(request.status.read() == [1], "{:?}", request.status.read());
            // The status is a byte, and the first only where there is no room for data (virtio 1.3, 2.7.8.2).
            ensure!(matches!(queue.used(0), (0, 0..=1)), "{:?}", queue.used(0));
            ensure!(!driver.needs_reset(), "DEVICE_NEEDS_RESET");
        }
    }
    Ok(())
}

/// Queues that cannot be, by what their registers hold.
fn bad_queues(driver: &Driver) -> Result<usize> {
    let good = RawQueue::new(driver, SIZE);
    let [descriptors, available, used] = good.addresses();
    let read_only = driver.buffer(4096, false);
    let good_size = u32::from(SIZE);
    let frame = good.descriptors.frame_address();
    let list = [
        // First, before anybody else is given its reference.
        (
            "a ring whose grant was ended",
            good_size,
            [descriptors, ended(driver), used],
        ),
        ("no size", 0, [descriptors, available, used]),
        (
            "a size that is no power of two",
            48,
            [descriptors, available, used],
        ),
        (
            "a size beyond the offered one",
            1024,
            [descriptors, available, used],
        ),
        (
            "a size of more than 16 bits",
            0x1_0040,
            [descriptors, available, used],
        ),
        ("all areas at address 0", good_size, [0, 0, 0]),
        ("descriptors at address 0", good_size, [0, available, used]),
        (
            "an available ring at address 0",
            good_size,
            [descriptors, 0, used],
        ),
        (
            "a used ring at address 0",
            good_size,
            [descriptors, available, 0],
        ),
        (
            "descriptors off their alignment",
            good_size,
            [descriptors + 8, available, used],
        ),
        (
            "an available ring off its alignment",
            good_size,
            [descriptors, available + 1, used],
        ),
        (
            "a used ring off its alignment",
            good_size,
            [descriptors, available, used + 2],
        ),
        (
            "a used ring that is granted read-only",
            good_size,
            [descriptors, available, read_only.address()],
        ),
        ("a ring by its frame", good_size, [frame, available, used]),
        ("a ring in no grant", good_size, [NO_GRANT, available, used]),
        (
            "a ring at the end of the address space",
            good_size,
            [!0xf, available, used],
        ),
    ];
    for (what, size, addresses) in list {
        let negotiated = driver.negotiate(driver.offered_features());
        ensure!(
            negotiated == Negotiated::Accepted,
            "{what}: good features refused"
        );
        driver.start_queue(0, size, addresses);
        // virtio 1.3, 2.1.2: a driver is told when it is ready for the interrupt, and not before.
        ensure!(
            !driver.needs_reset(),
            "{what}: DEVICE_NEEDS_RESET before DRIVER_OK"
        );
        driver.driver_ok();
        // Where the fault may be dom0's it is tried a few times more.
        ensure!(
            driver.wait(|| driver.needs_reset()),
            "{what}: no DEVICE_NEEDS_RESET"
        );
        let causes = driver.read(Register::InterruptStatus);
        ensure!(
            causes & CONFIGURATION != 0,
            "{what}: no configuration interrupt"
        );
        driver.notify(0);
        works(driver).with_context(|| format!("after a reset: {what}"))?;
    }
    Ok(list.len())
}

/// A driver that does not accept what keeps its memory safe is told so at FEATURES_OK.
fn bad_features(driver: &Driver) -> Result<usize> {
    let offered = driver.offered_features();
    let list = [
        0,
        offered & !(1 << VIRTIO_F_VERSION_1),
        offered & !(1 << VIRTIO_F_ACCESS_PLATFORM),
        offered | 1 << 34,
        u64::MAX,
    ];
    for features in list {
        let negotiated = driver.negotiate(features);
        ensure!(
            negotiated == Negotiated::Refused,
            "features {features:#x} accepted"
        );
    }
    works(driver)?;
    Ok(list.len())
}
