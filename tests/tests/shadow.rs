//! Devices whose requests a back-end answers, on shadow queues.

use std::sync::mpsc::channel;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{Fault, SimGuest, SimMachine};
use xen_virtio_tests::{
    Buffer, Driver, Framing, NEXT, Random, RawQueue, SAYS_NOTHING, ShadowEcho, WRITE, driver,
};

const SIZE: u16 = 16;

fn start(
    make: impl FnOnce() -> std::io::Result<ShadowEcho> + Send + 'static,
) -> (SimGuest, SimMachine, Driver) {
    let (guest, machine) =
        SimMachine::start(AddressMode::Grants, move || Ok(vec![Box::new(make()?)])).unwrap();
    let driver = driver(&guest, 0);
    (guest, machine, driver)
}

/// Has `sent` echoed into buffers of `lens` bytes, which are returned.
fn echo(
    driver: &Driver,
    queue: &mut RawQueue,
    sent: &[&[u8]],
    lens: &[usize],
) -> (u32, Vec<Buffer>) {
    let sent: Vec<Buffer> = sent
        .iter()
        .map(|bytes| {
            let buffer = driver.buffer(bytes.len(), false);
            buffer.write(0, bytes);
            buffer
        })
        .collect();
    let answers: Vec<Buffer> = lens.iter().map(|len| driver.buffer(*len, true)).collect();
    let readable = sent.iter().map(|buffer| (buffer, 0));
    let buffers: Vec<_> = readable
        .chain(answers.iter().map(|buffer| (buffer, WRITE)))
        .collect();
    for (index, (buffer, flags)) in buffers.iter().enumerate() {
        let index = u16::try_from(index).unwrap();
        let last = usize::from(index) + 1 == buffers.len();
        let (flags, next) = match last {
            true => (*flags, 0),
            false => (flags | NEXT, index + 1),
        };
        let len = u32::try_from(buffer.read().len()).unwrap();
        queue.set_descriptor(index, buffer.address(), len, flags, next);
    }
    let before = queue.used_index();
    queue.offer(0);
    if queue.wants_kick() {
        driver.notify(0);
    }
    assert!(driver.wait(|| queue.used_index() != before), "no answer");
    assert!(!driver.needs_reset());
    let (head, written) = queue.used(before);
    assert_eq!(head, 0);
    (written, answers)
}

#[test]
fn a_back_end_sees_the_guests_framing_and_the_guest_its_answer() {
    let (sender, framings) = channel();
    let (_guest, machine, driver) = start(move || {
        let device = ShadowEcho::new()?;
        sender.send(device.framings()).unwrap();
        Ok(device)
    });
    let framings = framings.recv().unwrap();
    let mut queue = driver.start(SIZE);
    let mut random = Random(1);
    let mut expected: Vec<Framing> = Vec::new();
    for _ in 0..200 {
        // Short and long ones, in and across pages.
        let mut len = || {
            let most = [16, 600, 5000][random.below(3)];
            1 + random.below(most)
        };
        let sent: Vec<Vec<u8>> = (0..3).map(|byte| vec![byte; len()]).collect();
        let sent: Vec<&[u8]> = sent.iter().map(Vec::as_slice).collect();
        let lens = [len(), len()];
        let (written, answers) = echo(&driver, &mut queue, &sent, &lens);
        let all = sent.concat();
        let room: usize = lens.iter().sum();
        assert_eq!(written as usize, all.len().min(room));
        let answer: Vec<u8> = answers.iter().flat_map(Buffer::read).collect();
        assert_eq!(answer[..written as usize], all[..written as usize]);
        assert!(answer[written as usize..].iter().all(|byte| *byte == 0));
        let part = |len: usize, writable| (u32::try_from(len).unwrap(), writable);
        let readable = sent.iter().map(|bytes| part(bytes.len(), false));
        expected.push(readable.chain(lens.map(|len| part(len, true))).collect());
    }
    assert_eq!(*framings.lock().unwrap(), expected);
    assert_eq!(machine.stop().unwrap()[0].requests, 200);
}

#[test]
fn a_request_that_the_pool_has_no_room_for_is_the_drivers_fault() {
    let (_guest, machine, driver) = start(ShadowEcho::new);
    let mut queue = driver.start(SIZE);
    // Eight pages, which is the most.
    let (written, _) = echo(&driver, &mut queue, &[&[1; 28 << 10]], &[16]);
    assert_eq!(written, 16);
    let large = driver.buffer(32 << 10, false);
    let answer = driver.buffer(16, true);
    queue.set_descriptor(0, large.address(), 32 << 10, NEXT, 1);
    queue.set_descriptor(1, answer.address(), 16, WRITE, 0);
    queue.offer(0);
    driver.notify(0);
    assert!(driver.wait(|| driver.needs_reset()));
    let mut queue = driver.start(SIZE);
    let (written, _) = echo(&driver, &mut queue, &[&[1; 28 << 10]], &[16]);
    assert_eq!(written, 16);
    machine.stop().unwrap();
}

/// What was taken with it has its pages back.
#[test]
fn a_driver_that_is_at_fault_again_and_again_keeps_its_pool() {
    let (_guest, machine, driver) = start(ShadowEcho::new);
    let [small, large] = [driver.buffer(16, false), driver.buffer(40 << 10, false)];
    for _ in 0..20 {
        let mut queue = driver.start(SIZE);
        queue.set_descriptor(0, small.address(), 16, 0, 0);
        queue.set_descriptor(1, large.address(), 40 << 10, 0, 0);
        queue.offer_together(&[0, 1]);
        driver.notify(0);
        assert!(driver.wait(|| driver.needs_reset()));
    }
    let mut queue = driver.start(SIZE);
    let (written, _) = echo(&driver, &mut queue, &[&[1; 28 << 10]], &[16]);
    assert_eq!(written, 16);
    machine.stop().unwrap();
}

/// Some back-ends write a status and say that they have written nothing; what they leave alone is to come back as it was.
#[test]
fn short_buffers_come_back_whole() {
    let (_guest, machine, driver) = start(ShadowEcho::new);
    let mut queue = driver.start(SIZE);
    let sent = driver.buffer(4, false);
    let [data, status] = [driver.buffer(600, true), driver.buffer(1, true)];
    queue.set_descriptor(0, sent.address(), 4, NEXT, 1);
    queue.set_descriptor(1, data.address(), 600, NEXT | WRITE, 2);
    queue.set_descriptor(2, status.address(), 1, WRITE, 0);
    for (byte, index, written, first, last) in
        [(1, 0, 4, 1, 0xff), (SAYS_NOTHING, 1, 0, 2, SAYS_NOTHING)]
    {
        sent.write(0, &[byte; 4]);
        data.write(0, &[2; 600]);
        status.write(0, &[0xff]);
        queue.offer(0);
        driver.notify(0);
        assert!(driver.wait(|| queue.used_index() == index + 1), "no answer");
        assert_eq!(queue.used(index), (0, written));
        assert_eq!(
            (data.read()[0], data.read()[4], status.read()),
            (first, 2, vec![last])
        );
    }
    machine.stop().unwrap();
}

/// Buffers that a driver posts for what may come some time.
#[test]
fn what_stays_with_the_back_end_leaves_room_for_the_rest() {
    let (_guest, machine, driver) = start(ShadowEcho::new);
    driver.negotiate(1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM);
    let mut queues = [RawQueue::new(&driver, SIZE), RawQueue::new(&driver, SIZE)];
    for (queue, index) in queues.iter().zip(0..) {
        driver.start_queue(index, SIZE.into(), queue.addresses());
    }
    driver.driver_ok();
    let posted: Vec<Buffer> = (0..SIZE).map(|_| driver.buffer(4096, true)).collect();
    for (buffer, index) in posted.iter().zip(0..) {
        queues[1].set_descriptor(index, buffer.address(), 4096, WRITE, 0);
        queues[1].offer(index);
    }
    driver.notify(1);
    for round in 0..50 {
        // All that a request may have.
        let sent = vec![round; 16 << 10];
        let (written, answers) = echo(&driver, &mut queues[0], &[&sent], &[16 << 10]);
        assert_eq!((written, answers[0].read()), (16 << 10, sent));
        // Another queue's requests of the kind have their share.
        let (written, _) = echo(&driver, &mut queues[0], &[], &[4 * 4096]);
        assert_eq!(written, 0);
    }
    assert_eq!(queues[1].used_index(), 0);
    machine.stop().unwrap();
}

#[test]
fn a_back_end_that_dies_is_followed_by_one_that_does_the_rest() {
    let (guest, machine, driver) = start(|| ShadowEcho::dying(3));
    let mut queue = driver.start(SIZE);
    for round in 0..100u8 {
        // Dom0 lacks memory besides, now and then.
        if round % 7 == 0 {
            guest.memory().faults().order(Fault::CopyCall, 2);
        }
        let (written, answers) = echo(&driver, &mut queue, &[&[round; 700]], &[300, 400]);
        assert_eq!(written, 700);
        assert!(
            answers
                .iter()
                .flat_map(Buffer::read)
                .all(|byte| byte == round)
        );
    }
    assert_eq!(machine.stop().unwrap()[0].request_errors, 0);
}

#[test]
fn what_a_dead_back_end_has_left_is_done_in_its_order() {
    let (sender, framings) = channel();
    let (_guest, machine, driver) = start(move || {
        let device = ShadowEcho::dying(2)?;
        sender.send(device.framings()).unwrap();
        Ok(device)
    });
    let framings = framings.recv().unwrap();
    let mut queue = driver.start(SIZE);
    let (written, _) = echo(&driver, &mut queue, &[&[1; 8]], &[8]);
    assert_eq!(written, 8);
    let buffer = driver.buffer(64, true);
    for (head, len) in [(4, 30), (2, 10), (7, 20)] {
        queue.set_descriptor(head, buffer.address(), len, WRITE, 0);
    }
    queue.offer_together(&[4, 2, 7]);
    driver.notify(0);
    assert!(driver.wait(|| queue.used_index() == 4), "no answer");
    let seen = framings.lock().unwrap().clone();
    assert_eq!(seen[1..], [[(30, true)], [(10, true)], [(20, true)]]);
    machine.stop().unwrap();
}
