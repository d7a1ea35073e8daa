//! What holds for any device, whatever it does with its requests.

mod subjects;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use subjects::{Piece, Subject, subjects};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_backend::Unfinished;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::SimGuest;
use xen_virtio_tests::{
    Driver, NEXT, Negotiated, Random, RawQueue, allow_descriptors, drive_over_deaths_by, driver_by,
    wait_for_all,
};
use xen_virtio_transport::{Register, Width};

const SIZE: u16 = 16;
/// Requests that are made available at once, of three descriptors at most.
const TOGETHER: u16 = 3;

/// How a driver may name its memory.
const MODES: [AddressMode; 2] = [AddressMode::Grants, AddressMode::Frames];

/// Has `what` drive each device, which nobody kills.
fn for_each(what: impl Fn(&SimGuest, &Driver, &Subject) + Clone + Send + 'static) {
    for mode in MODES {
        for subject in subjects() {
            let make = Arc::clone(&subject.make);
            let what = what.clone();
            drive_over_deaths_by(mode, &[], 0, &make, move |guest| {
                println!("{}, {mode:?}", subject.name);
                what(guest, &driver_by(mode, guest, 0), &subject);
            });
        }
    }
}

/// Has `rounds` of requests carried out in a queue that has just begun; `done` judges how each has ended.
fn carry_out(
    guest: &SimGuest,
    driver: &Driver,
    queue: &mut RawQueue,
    subject: &Subject,
    rounds: u16,
    done: impl Fn(&dyn Piece, u32),
) {
    for round in 1..=rounds {
        let heads: Vec<u16> = (0..TOGETHER).map(|index| 3 * index).collect();
        let pieces: Vec<_> = heads.iter().map(|_| (subject.request)(driver)).collect();
        for (piece, head) in pieces.iter().zip(&heads) {
            piece.describe(queue, *head);
        }
        queue.offer_together(&heads);
        driver.notify(subject.queue);
        let back = wait_for_all(guest, queue, TOGETHER * round, &heads);
        for (piece, head) in pieces.iter().zip(&heads) {
            done(&**piece, back[head]);
        }
    }
    assert!(!driver.needs_reset());
}

fn as_it_should(piece: &dyn Piece, written: u32) {
    piece.check(written);
}

fn works(guest: &SimGuest, driver: &Driver, subject: &Subject) {
    let mut queue = driver.start_with(subject.queue, SIZE);
    carry_out(guest, driver, &mut queue, subject, 4, as_it_should);
    driver.write(Register::Status, 0);
}

#[test]
fn requests_come_back_once_each_as_they_are_to_end() {
    for_each(|guest, driver, subject| {
        works(guest, driver, subject);
        // By the flag in place of the index, too.
        let features = driver.offered_features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        assert_eq!(driver.negotiate(features), Negotiated::Accepted);
        let mut queue = RawQueue::new(driver, SIZE);
        driver.start_queue(subject.queue, SIZE.into(), queue.addresses());
        driver.driver_ok();
        carry_out(guest, driver, &mut queue, subject, 4, as_it_should);
    });
}

#[test]
fn a_queue_may_have_any_power_of_two_up_to_the_devices_size() {
    for_each(|guest, driver, subject| {
        driver.write(Register::QueueSel, subject.queue);
        let most = driver.read(Register::QueueSizeMax);
        assert!(most.is_power_of_two());
        for size in [16, most.min(256), most] {
            let mut queue = driver.start_with(subject.queue, u16::try_from(size).unwrap());
            carry_out(guest, driver, &mut queue, subject, 2, as_it_should);
        }
        for size in [0, 3, 2 * most, u32::MAX] {
            assert_eq!(
                driver.negotiate(driver.offered_features()),
                Negotiated::Accepted
            );
            let queue = RawQueue::new(driver, SIZE);
            driver.start_queue(subject.queue, size, queue.addresses());
            driver.driver_ok();
            assert!(driver.needs_reset(), "{size}");
        }
        works(guest, driver, subject);
    });
}

#[test]
fn a_driver_that_accepts_too_little_does_not_get_on() {
    for_each(|guest, driver, subject| {
        let features = driver.offered_features() & !(1 << VIRTIO_F_VERSION_1);
        assert_eq!(driver.negotiate(features), Negotiated::Refused);
        works(guest, driver, subject);
    });
}

#[test]
fn a_reset_or_a_stopped_queue_ends_what_is_under_way_and_the_next_driver_begins_anew() {
    for_each(|guest, driver, subject| {
        for round in 0..40 {
            let mut queue = driver.start_with(subject.queue, SIZE);
            let pieces = [(); 3].map(|()| (subject.request)(driver));
            for (piece, head) in pieces.iter().zip([0, 3, 6]) {
                piece.describe(&queue, head);
            }
            queue.offer_together(&[0, 3, 6]);
            driver.notify(subject.queue);
            for _ in 0..round % 8 {
                driver.read(Register::Status);
            }
            if round % 2 == 0 {
                driver.write(Register::QueueSel, subject.queue);
                driver.write(Register::QueueReady, 0);
                let before = queue.used_index();
                driver.settle();
                assert_eq!(queue.used_index(), before, "a stopped queue goes on");
            }
            driver.write(Register::Status, 0);
            assert_eq!(driver.read(Register::Status), 0);
            let before = queue.used_index();
            driver.settle();
            assert_eq!(queue.used_index(), before, "a queue outlives its reset");
        }
        works(guest, driver, subject);
    });
}

#[test]
fn what_the_rings_must_not_say_stops_the_device_until_it_is_reset() {
    /// What is done with a running queue and a good request at descriptor 0 that was not offered.
    type Mischief = fn(&mut RawQueue);
    let mischiefs: [(&str, Mischief); 5] = [
        ("a chain beyond the table", |queue| queue.offer(SIZE)),
        ("the available index ahead", |queue| {
            queue.set_available_index(SIZE + 1);
        }),
        ("a chain twice", |queue| queue.offer_together(&[0, 0])),
        ("a loop", |queue| {
            queue.set_descriptor(9, 0, 16, NEXT, 9);
            queue.offer(9);
        }),
        ("an indirect table", |queue| {
            queue.set_descriptor(9, 0, 16, 4, 0);
            queue.offer(9);
        }),
    ];
    for_each(move |guest, driver, subject| {
        for (name, mischief) in mischiefs {
            let mut queue = driver.start_with(subject.queue, SIZE);
            let piece = (subject.request)(driver);
            piece.describe(&queue, 0);
            mischief(&mut queue);
            driver.notify(subject.queue);
            assert!(
                driver.wait(|| driver.needs_reset()),
                "{}: {name}",
                subject.name
            );
            works(guest, driver, subject);
        }
    });
}

#[test]
fn the_configuration_space_reads_the_same_at_every_width_and_keeps_what_it_is() {
    for_each(|guest, driver, subject| {
        let generation = driver.read(Register::ConfigGeneration);
        let space = || -> Vec<u8> {
            let byte = |offset: u64| driver.raw_read(0x100 + offset, Width::One);
            (0..0x100)
                .map(|offset| byte(offset).to_le_bytes()[0])
                .collect()
        };
        let before = space();
        for (width, bytes) in [(Width::Two, 2), (Width::Four, 4), (Width::Eight, 8)] {
            for offset in (0..0x100).step_by(bytes) {
                let value = driver.raw_read(0x100 + offset as u64, width).to_le_bytes();
                assert_eq!(
                    value[..bytes],
                    before[offset..offset + bytes],
                    "{offset:#x}"
                );
                driver.raw_write(0x100 + offset as u64, width, u64::MAX);
                for (place, value) in (0..subject.selected).zip(&before) {
                    driver.raw_write(0x100 + place, Width::One, (*value).into());
                }
            }
        }
        assert_eq!(space(), before);
        assert_eq!(driver.read(Register::ConfigGeneration), generation);
        works(guest, driver, subject);
    });
}

#[test]
fn a_death_at_any_step_costs_no_request_and_repeats_none_that_must_not_be() {
    allow_descriptors();
    let seed = 0x636f_6e66;
    println!("seed {seed:#x}");
    let run = move |subject: Subject| {
        let mut random = Random(seed);
        let (mut died, mut given_back) = (0, 0);
        for mode in MODES.into_iter().cycle().take(150) {
            let step = 1 + random.below(700) as u64;
            let make = Arc::clone(&subject.make);
            let Subject {
                name,
                unfinished,
                selected,
                queue,
                request,
                ..
            } = subject;
            let empty = Arc::new(AtomicU32::new(0));
            let counted = Arc::clone(&empty);
            died += drive_over_deaths_by(mode, &[step], 0, &make, move |guest| {
                let driver = driver_by(mode, guest, 0);
                let subject = Subject {
                    name,
                    make: Arc::new(|_| unreachable!("a driver makes no device")),
                    unfinished,
                    selected,
                    queue,
                    request,
                };
                let mut queue = driver.start_with(subject.queue, SIZE);
                carry_out(guest, &driver, &mut queue, &subject, 6, |piece, written| {
                    if written == 0 && unfinished == Unfinished::GiveBack {
                        counted.fetch_add(1, Ordering::SeqCst);
                    } else {
                        piece.check(written);
                    }
                });
            });
            given_back += empty.load(Ordering::SeqCst);
        }
        (subject.name, died, given_back)
    };
    let threads: Vec<_> = subjects()
        .into_iter()
        .map(|subject| thread::spawn(move || run(subject)))
        .collect();
    for thread in threads {
        let (name, died, given_back) = thread.join().unwrap();
        println!("{name}: {died} deaths, {given_back} requests given back");
        assert!(died > 50, "{name}: only {died} deaths");
        assert_eq!(
            given_back > 0,
            name.ends_with("echo"),
            "{name}: {given_back}"
        );
    }
}
