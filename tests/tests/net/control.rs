//! What a driver sets, and what it is held to.

use super::*;

#[test]
fn the_control_queue_sets_what_is_received() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut control] = bench.start(0, [RECEIVE, 2]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let mut set = |bytes: &[u8]| command(driver, &mut control, 2, bytes).0;
    // A frame that is wanted and marks the end of those that are not.
    let end = frame(MAC, 60, 0xff);
    let mut posted = 0;
    let mut arrive = |frames: &[Vec<u8>]| -> Vec<u8> {
        for frame in frames.iter().chain([&end]) {
            wire.send(frame);
        }
        let mut marks = Vec::new();
        while marks.last() != Some(&0xff) {
            let buffers = post(driver, &mut receive, RECEIVE, posted % SIZE, &[2000]);
            posted += 1;
            assert!(driver.wait(|| receive.used_index() == posted));
            marks.push(buffers[0].read()[HEADER + 30]);
        }
        marks
    };
    let to = [MAC, OTHER, BROADCAST, [1, 0, 0, 0, 0, 1]];
    let all = || (0..).zip(to).map(|(mark, to)| frame(to, 60, mark));
    let all = || all().collect::<Vec<_>>();
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    assert_eq!(set(&[0, 0, 0]), 0, "not promiscuous");
    assert_eq!(arrive(&all()), [0, 2, 0xff]);
    let table = [&[1, 0, 1, 0, 0, 0][..], &OTHER, &[0, 0, 0, 0]].concat();
    assert_eq!(set(&table), 0);
    assert_eq!(arrive(&all()), [0, 1, 2, 0xff]);
    assert_eq!(set(&[0, 1, 1]), 0, "all multicast");
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    let mut tagged = frame(MAC, 60, 9);
    tagged[HEADER + 12..HEADER + 16].copy_from_slice(&[0x81, 0, 0, 7]);
    assert_eq!(arrive(std::slice::from_ref(&tagged)), [0xff]);
    assert_eq!(set(&[2, 0, 7, 0]), 0, "VLAN 7");
    assert_eq!(arrive(std::slice::from_ref(&tagged)), [9, 0xff]);
    assert_eq!(set(&[1, 1, 2, 2, 2, 2, 2, 2]), 0, "another address");
    assert_eq!(driver.raw_read(0x100, Width::Four), 0x0202_0202);
    assert_eq!(set(&[0, 0, 1]), 0, "promiscuous again");
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    let csum = 1u64 << ids::VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(set(&[&[5, 0][..], &csum.to_le_bytes()].concat()), 0);
    assert!(driver.wait(|| wire.offloads() == Some(csum)));
    // What cannot be is refused, and changes nothing.
    for bad in [
        &[4, 0, 1, 0][..],
        &[5, 0, 0xff, 0, 0, 0, 0, 0, 0, 0xff],
        &[2, 0, 0, 0x10],
        &[0],
        &[9, 9, 9],
    ] {
        assert_eq!(set(bad), 1, "{bad:?}");
    }
    assert_eq!(wire.offloads(), Some(csum));
    let report = bench.end();
    assert_eq!(report.metrics["control_refused"], 5);
    assert_eq!(report.metrics["control_commands"], 12);
}

#[test]
fn pairs_are_used_as_the_driver_sets_them() {
    let bench = Bench::new(2, NO_LIMITS);
    assert_eq!(bench.driver.raw_read(0x108, Width::Two), 2);
    let [mut first, mut second, mut control] = bench.start(0, [0, 2, 4]);
    let driver = &bench.driver;
    let mut set = |pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        command(driver, &mut control, 4, &[4, 0, low, high]).0
    };
    let one = post(driver, &mut first, 0, 0, &[256; 8]);
    let other = post(driver, &mut second, 2, 0, &[256; 8]);
    bench.wires[1].send(&frame(MAC, 60, 9));
    bench.wires[0].send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| first.used_index() == 1));
    driver.settle();
    assert_eq!(
        (second.used_index(), one[0].read()[40]),
        (0, 2),
        "not used yet"
    );
    for (pairs, answer) in [(0, 1), (3, 1), (u16::MAX, 1), (2, 0), (2, 0)] {
        assert_eq!(set(pairs), answer, "{pairs}");
    }
    driver.settle();
    bench.wires[1].send(&frame(MAC, 60, 1));
    assert!(driver.wait(|| second.used_index() == 1));
    assert_eq!(other[0].read()[40], 1);
    assert_eq!(set(1), 0);
    bench.wires[1].send(&frame(MAC, 60, 3));
    driver.settle();
    assert_eq!(second.used_index(), 1);
    // Without MQ the control queue is the third.
    let [mut control] = bench.start(1 << ids::VIRTIO_NET_F_MQ, [2]);
    assert_eq!(command(driver, &mut control, 2, &[0, 0, 1]).0, 0);
    assert_eq!(command(driver, &mut control, 2, &[4, 0, 1, 0]).0, 1);
    assert!(!driver.needs_reset());
    drop(bench.end());
}

#[test]
fn interrupts_come_as_the_driver_has_asked() {
    let bench = Bench::new(1, NO_LIMITS);
    // By the flag: an interrupt for each frame, if nothing moderates them.
    let [mut receive, mut control] = bench.start(1 << VIRTIO_RING_F_EVENT_IDX, [RECEIVE, 2]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // Eight frames, or 200 ms.
    let coal = [&[6, 1][..], &8u32.to_le_bytes(), &200_000u32.to_le_bytes()].concat();
    assert_eq!(command(driver, &mut control, 2, &coal).0, 0);
    let (answer, rule) = command(driver, &mut control, 2, &[6, 3, 0, 0, 0, 0]);
    assert_eq!((answer, &rule[..]), (0, &coal[2..]));
    assert_eq!(command(driver, &mut control, 2, &[6, 3, 2, 0, 0, 0]).0, 1);
    let _buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 16]);
    driver.settle();
    let before = bench.guest.interrupts(FIRST_IRQ);
    for mark in 0..7 {
        wire.send(&frame(MAC, 60, mark));
    }
    assert!(driver.wait(|| receive.used_index() == 7), "they are there");
    assert_eq!(bench.guest.interrupts(FIRST_IRQ), before);
    wire.send(&frame(MAC, 60, 7));
    assert!(driver.wait(|| bench.guest.interrupts(FIRST_IRQ) == before + 1));
    let began = Instant::now();
    wire.send(&frame(MAC, 60, 8));
    assert!(driver.wait(|| bench.guest.interrupts(FIRST_IRQ) == before + 2));
    assert!(
        began.elapsed() >= Duration::from_millis(150),
        "{:?}",
        began.elapsed()
    );
    drop(bench.end());
}

#[test]
fn a_rate_holds_both_ways() {
    let rate = |frames| Limits {
        operations: NonZeroU64::new(frames),
        ..Limits::default()
    };
    let bench = Bench::new(1, [rate(200), rate(100)]);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let began = Instant::now();
    for _ in 0..41 {
        send(driver, &mut sending, &frame(OTHER, 60, 1), &[72]);
        wire.receive();
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(150), "{took:?}");
    let began = Instant::now();
    for round in 0..2 {
        let _buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 16]);
        for _ in 0..16 {
            wire.send(&frame(MAC, 60, 1));
        }
        assert!(driver.wait(|| receive.used_index() == 16 * (round + 1)));
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(260), "{took:?}");
    drop(bench.end());
}

#[test]
fn no_pair_starves_for_the_others_at_a_rate() {
    let limits = Limits {
        operations: NonZeroU64::new(200),
        ..Limits::default()
    };
    let bench = Bench::new(2, [limits, Limits::default()]);
    let [mut first, mut other] = bench.start(0, [1, 3]);
    let driver = &bench.driver;
    let buffer = driver.buffer(72, false);
    buffer.write(0, &frame(OTHER, 60, 1));
    let mut rounds = [0u16; 2];
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        for ((queue, index), round) in [(&mut first, 1), (&mut other, 3)]
            .into_iter()
            .zip(&mut rounds)
        {
            if queue.used_index() == *round {
                for head in 0..SIZE {
                    queue.set_descriptor(head, buffer.address(), 72, 0, 0);
                }
                queue.offer_together(&(0..SIZE).collect::<Vec<_>>());
                driver.notify(index);
                *round += SIZE;
            }
        }
        for wire in &bench.wires {
            while wire.try_receive().is_some() {}
        }
    }
    let [one, two] = [first.used_index(), other.used_index()];
    assert!(one > 15 && two > 15, "{one} and {two}");
    drop(bench.end());
}
