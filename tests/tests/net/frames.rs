//! What becomes of frames, and of the buffers that they are in.

use super::*;

#[test]
fn frames_go_both_ways_in_any_pieces() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(MERGED, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let sent = frame(OTHER, 1500, 5);
    for pieces in [
        &[HEADER, 1500][..],
        &[HEADER + 1500],
        &[1, HEADER - 1, 1, 1499],
        &[HEADER + 6, 700, 0, 794],
        &[5, 5, 5, 5, 1492],
    ] {
        send(driver, &mut sending, &sent, pieces);
        assert_eq!(wire.receive(), sent, "{pieces:?}");
    }
    let mut received = frame(MAC, 1514, 6);
    wire.send(&received);
    // 5.1.6.4.1: one buffer, which is several descriptors.
    received[10] = 1;
    let pieces = [5, HEADER, 700, 2000];
    let buffers = post_in_pieces(driver, &mut receive, RECEIVE, &pieces);
    assert!(driver.wait(|| receive.used_index() == 1));
    assert_eq!(joined(&buffers, &pieces)[..received.len()], received);
    assert_eq!(receive.used(0), (0, u32::try_from(received.len()).unwrap()));
    let report = bench.end();
    let metric = |name: &str| report.metrics[name];
    assert_eq!((metric("sent_frames"), metric("sent_bytes")), (5, 7500));
    assert_eq!(
        (metric("received_frames"), metric("received_bytes")),
        (1, 1514)
    );
    assert_eq!((report.requests, report.request_errors), (6, 0));
}

#[test]
fn a_frame_and_its_header_may_be_cut_anywhere() {
    const LEN: usize = 100;
    for without in [0, MERGED] {
        let bench = Bench::new(1, NO_LIMITS);
        let [mut receive, mut sending] = bench.start(without, [RECEIVE, SEND]);
        let (driver, wire) = (&bench.driver, &bench.wires[0]);
        for (pieces, mark) in cuts(HEADER + LEN).zip((0..=u8::MAX).cycle()) {
            let sent = frame(OTHER, LEN, mark);
            send(driver, &mut sending, &sent, &pieces);
            assert_eq!(wire.receive(), sent, "{pieces:?}");
            let mut received = frame(MAC, LEN, mark);
            let used = receive.used_index();
            let buffers = post_in_pieces(driver, &mut receive, RECEIVE, &pieces);
            wire.send(&received);
            assert!(driver.wait(|| receive.used_index() != used), "{pieces:?}");
            // 5.1.6.4.1: one buffer, however many descriptors it has.
            received[10] = 1;
            assert_eq!(joined(&buffers, &pieces), received, "{pieces:?}");
        }
        assert_eq!(bench.end().request_errors, 0);
    }
}

#[test]
fn a_frame_larger_than_a_buffer_is_dropped_whole_and_counted() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(MERGED, [RECEIVE]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let buffers = post(
        driver,
        &mut receive,
        RECEIVE,
        0,
        &[HEADER + 100, HEADER + 100],
    );
    wire.send(&frame(MAC, 101, 1));
    wire.send(&frame(MAC, 2000, 2));
    wire.send(&frame(MAC, 100, 3));
    assert!(driver.wait(|| receive.used_index() == 1));
    driver.settle();
    assert_eq!((receive.used_index(), receive.used(0)), (1, (0, 112)));
    assert_eq!(buffers[0].read()[HEADER + 6..], [3; 94]);
    assert_eq!(buffers[1].read(), [0; HEADER + 100]);
    assert_eq!(bench.end().metrics["dropped_too_large"], 2);
}

#[test]
fn a_frame_lies_in_as_many_buffers_as_it_takes_where_they_are_merged() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(0, [RECEIVE]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // It waits for the third.
    let mut buffers = post(driver, &mut receive, RECEIVE, 0, &[100, 100]);
    wire.send(&frame(MAC, 250, 1));
    driver.settle();
    assert_eq!(receive.used_index(), 0);
    buffers.extend(post(driver, &mut receive, RECEIVE, 2, &[100, 100]));
    assert!(driver.wait(|| receive.used_index() == 3));
    let lens = [0, 1, 2].map(|index| receive.used(index));
    assert_eq!(lens, [(0, 100), (1, 100), (2, 62)]);
    let bytes: Vec<u8> = buffers.iter().flat_map(Buffer::read).collect();
    assert_eq!(bytes[10..12], [3, 0], "num_buffers");
    assert_eq!(bytes[HEADER + 6..HEADER + 250], [1; 244]);
    // More than all of the queue: whatever the driver posts is too little.
    buffers.extend(post(driver, &mut receive, RECEIVE, 4, &[100; 12]));
    buffers.extend(post(driver, &mut receive, RECEIVE, 0, &[100; 3]));
    wire.send(&frame(MAC, 1600, 2));
    wire.send(&frame(MAC, 60, 3));
    assert!(driver.wait(|| receive.used_index() == 4));
    assert_eq!(receive.used(3), (3, 72));
    assert_eq!(bench.end().metrics["dropped_too_large"], 1);
}

#[test]
fn a_driver_sees_no_part_of_what_it_does_not_take() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(PLAIN, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // Offloads need each other (5.1.3.1); this driver has accepted some that need what it has not.
    let csum = 1 << ids::VIRTIO_NET_F_GUEST_CSUM;
    assert!(driver.wait(|| wire.offloads().is_some_and(|bits| bits & csum == 0)));
    let buffers = post(driver, &mut receive, RECEIVE, 0, &[2000]);
    let mut partial = frame(MAC, 60, 1);
    partial[0] = 1;
    wire.send(&partial);
    wire.send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| receive.used_index() == 1));
    assert_eq!(buffers[0].read()[HEADER + 6], 2);
    // Nor does it send what it has not accepted.
    let mut partial = frame(OTHER, 60, 3);
    partial[0] = 1;
    send(driver, &mut sending, &partial, &[72]);
    for len in [0, 1, HEADER, HEADER + 13, (1 << 16) + 100] {
        send(driver, &mut sending, &vec![0; len], &[len]);
    }
    send(driver, &mut sending, &frame(OTHER, 60, 4), &[72]);
    assert_eq!(wire.receive()[HEADER + 6], 4);
    let report = bench.end();
    assert_eq!(report.metrics["dropped_unfit"], 1);
    assert_eq!(report.metrics["dropped_malformed"], 6);
    assert_eq!(report.request_errors, 6);
}

#[test]
fn memory_that_cannot_be_used_costs_its_frame_and_no_other() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let good = [driver.buffer(2000, true), driver.buffer(2000, true)];
    let bad = driver.buffer(2000, false);
    for (head, buffer) in [(0, &good[0]), (1, &bad), (2, &good[1])] {
        receive.set_descriptor(head, buffer.address(), 2000, WRITE, 0);
    }
    receive.offer_together(&[0, 1, 2]);
    for mark in 1..=3 {
        wire.send(&frame(MAC, 60, mark));
    }
    driver.notify(RECEIVE);
    assert!(driver.wait(|| receive.used_index() == 3));
    assert_eq!(
        [0, 1, 2].map(|index| receive.used(index)),
        [(0, 72), (1, 0), (2, 72)]
    );
    assert_eq!(
        [&good[0], &good[1]].map(|buffer| buffer.read()[HEADER + 6]),
        [1, 3]
    );
    // A frame that cannot be read is not sent.
    let gone = driver.buffer(72, false);
    let address = gone.address();
    gone.revoke();
    sending.set_descriptor(0, address, 72, 0, 0);
    sending.offer(0);
    driver.notify(SEND);
    assert!(driver.wait(|| sending.used_index() == 1));
    send(driver, &mut sending, &frame(OTHER, 60, 4), &[72]);
    assert_eq!(wire.receive()[HEADER + 6], 4);
    assert!(!driver.needs_reset());
    assert_eq!(bench.end().request_errors, 2);
}

#[test]
fn what_dom0_lacks_for_a_moment_costs_no_frame() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let faults = bench.guest.memory().faults();
    for round in 0..8u8 {
        faults.order(Fault::CopyCall, 4);
        let buffers = post(driver, &mut receive, RECEIVE, u16::from(round), &[2000]);
        wire.send(&frame(MAC, 60, round));
        let expected = u16::from(round) + 1;
        assert!(driver.wait(|| receive.used_index() == expected));
        assert_eq!(buffers[0].read()[HEADER + 6], round);
        faults.order(Fault::CopyCall, 4);
        send(driver, &mut sending, &frame(OTHER, 60, round), &[72]);
        assert_eq!(wire.receive()[HEADER + 6], round);
    }
    let report = bench.end();
    assert_eq!((report.request_errors, report.warning), (0, None));
}

#[test]
fn a_reset_in_a_flood_delivers_nothing_into_old_buffers() {
    let (guest, machine) = SimMachine::start(AddressMode::Grants, || {
        let flood = Flood::new(frame(MAC, 60, 7))?;
        let kept = StateArea::private(Net::kept_bytes(1))?;
        Ok(vec![network(vec![Box::new(flood)], NO_LIMITS, kept, true)?])
    })
    .unwrap();
    let driver = driver(&guest, 0);
    for round in 0..100 {
        let [mut receive] = start(&driver, 0, [RECEIVE]);
        let lens = vec![2000; 1 + round % 8];
        let buffers = post(&driver, &mut receive, RECEIVE, 0, &lens);
        for _ in 0..round % 5 {
            driver.read(Register::Status);
        }
        driver.write(Register::Status, 0);
        let used = receive.used_index();
        let marks = || -> Vec<u8> { buffers.iter().map(|buffer| buffer.read()[30]).collect() };
        let before = marks();
        driver.settle();
        assert_eq!((receive.used_index(), marks()), (used, before));
    }
    drop(machine.stop().unwrap());
}

#[test]
fn a_receive_queue_that_is_empty_and_refilled_under_a_flood_goes_on() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(0, [RECEIVE]);
    let driver = &bench.driver;
    let wire = &bench.wires[0];
    thread::scope(|scope| {
        const FRAMES: u16 = 300;
        scope.spawn(|| {
            for mark in 0..FRAMES {
                wire.send(&frame(MAC, 60, mark.to_le_bytes()[0]));
            }
        });
        let mut next = 0;
        while next < FRAMES {
            let count = (next % 7 + 1).min(FRAMES - next);
            let buffers = post(driver, &mut receive, RECEIVE, 0, &vec![256; count.into()]);
            // Asleep, now and then, before there are any.
            if next % 50 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            next += count;
            assert!(
                driver.wait(|| receive.used_index() == next),
                "stalled before {next}"
            );
            for (buffer, mark) in buffers.iter().zip(next - count..) {
                assert_eq!(buffer.read()[HEADER + 6], mark.to_le_bytes()[0]);
            }
        }
    });
    drop(bench.end());
}

#[test]
fn frames_that_came_before_the_driver_are_not_its_own() {
    let bench = Bench::new(1, NO_LIMITS);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    driver.write(Register::Status, 0);
    for _ in 0..20 {
        wire.send(&frame(MAC, 60, 1));
    }
    let [mut receive] = bench.start(0, [RECEIVE]);
    let buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 8]);
    driver.settle();
    wire.send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| receive.used_index() == 1));
    assert_eq!(buffers[0].read()[40], 2);
    drop(bench.end());
}

#[test]
fn many_small_buffers_are_copied_a_few_at_a_time() {
    let bench = Bench::new(1, NO_LIMITS);
    let driver = &bench.driver;
    assert_eq!(
        driver.negotiate(driver.offered_features()),
        Negotiated::Accepted
    );
    let mut sending = RawQueue::new(driver, 512);
    driver.start_queue(SEND, 512, sending.addresses());
    driver.driver_ok();
    let buffer = driver.buffer(512, false);
    buffer.write(0, &frame(OTHER, 500, 1));
    // Heads that share a tail of 400 descriptors.
    for head in 0..64 {
        sending.set_descriptor(head, buffer.address(), 32, NEXT, 64);
    }
    for index in 64..464 {
        let next = if index < 463 { NEXT } else { 0 };
        sending.set_descriptor(index, buffer.address(), 1, next, index + 1);
    }
    sending.offer_together(&(0..64).collect::<Vec<_>>());
    driver.notify(SEND);
    thread::scope(|scope| {
        let wire = &bench.wires[0];
        let drained = scope.spawn(move || (0..64).for_each(|_| drop(wire.receive())));
        assert!(driver.wait(|| sending.used_index() == 64));
        drained.join().unwrap();
    });
    let report = bench.end();
    let (calls, segments) = (report.copy_batches, report.copy_segments);
    assert!(segments <= calls * 1000, "{segments} in {calls} calls");
}
