//! What no driver of good will sends.

use super::*;
use std::sync::atomic::{AtomicU32, Ordering};
use xen_virtio_tests::NEXT;

#[test]
fn packets_that_are_none_are_dropped_or_reset_and_harm_no_connection() {
    let mut bench = Bench::new();
    let mut program = bench.connect(1000, 52);
    let good = Header::new(RW, 1000, 52);
    // Dropped: too short, too long, of somebody else, for somebody else, of more bytes than there are.
    let long = [
        Header {
            len: 70_000,
            ..good
        }
        .to_bytes(),
        vec![0; 70_000],
    ]
    .concat();
    let others = Header {
        from: (43, 1000),
        ..good
    };
    let elsewhere = Header {
        to: (3, 52),
        ..good
    };
    let short = Header { len: 5, ..good };
    let malformed = [
        good.to_bytes()[..HEADER - 1].to_vec(),
        vec![0],
        long,
        others.to_bytes(),
        elsewhere.to_bytes(),
        [short.to_bytes(), vec![0; 4]].concat(),
    ];
    for packet in &malformed {
        let before = bench.side.sends.used_index();
        let _buffer = bench.side.offer(packet);
        assert!(
            bench
                .side
                .driver
                .wait(|| bench.side.sends.used_index() != before)
        );
    }
    assert!(bench.side.is_quiet());
    // A chain that has nothing to read.
    let before = bench.side.sends.used_index();
    let buffer = bench.side.driver.buffer(64, true);
    bench
        .side
        .sends
        .set_descriptor(0, buffer.address(), 64, WRITE, 0);
    bench.side.sends.offer(0);
    bench.side.driver.notify(SEND);
    assert!(
        bench
            .side
            .driver
            .wait(|| bench.side.sends.used_index() != before)
    );
    // Reset: of another type, of an operation that there is not, of no connection.
    for header in [
        Header {
            kind: 2,
            ..Header::new(REQUEST, 5, 6)
        },
        Header::new(8, 5, 6),
        Header::new(0, 5, 6),
        Header::new(RW, 5, 6),
        Header::new(RESPONSE, 5, 6),
        Header::new(SHUTDOWN, 5, 6),
        Header::new(CREDIT_UPDATE, 5, 6),
        Header::new(CREDIT_REQUEST, 5, 6),
    ] {
        bench.side.send(header, &[]);
        bench.side.expect(RESET, 5, 6);
    }
    // A reset is not answered by another.
    bench.side.send(Header::new(RESET, 5, 6), &[]);
    assert!(bench.side.is_quiet());
    bench.side.send(good, b"unharmed");
    assert_eq!(read_exactly(&mut program, 8), b"unharmed");
    let report = bench.end();
    assert_eq!(report.metrics["malformed"], malformed.len() as u64 + 4);
}

#[test]
fn who_breaks_a_connections_rules_loses_that_one() {
    let mut bench = Bench::new();
    let mut other = bench.connect(999, 52);
    /// What a guest does by a connection from its port 1000 to port 52.
    type Breach = fn(&mut Side);
    let breaks: [(&str, Breach); 4] = [
        ("a request again", |side| {
            side.send(Header::new(REQUEST, 1000, 52), &[])
        }),
        ("a response to nothing", |side| {
            side.send(Header::new(RESPONSE, 1000, 52), &[])
        }),
        ("data after its end", |side| {
            let end = Header {
                flags: NO_MORE_SENDING,
                ..Header::new(SHUTDOWN, 1000, 52)
            };
            side.send(end, &[]);
            side.send(Header::new(RW, 1000, 52), b"more");
        }),
        ("more than there is room for", |side| {
            for _ in 0..20 {
                side.send(Header::new(RW, 1000, 52), &[0; 65_536]);
            }
        }),
    ];
    for (what, break_it) in &breaks {
        println!("{what}");
        let mut program = bench.connect(1000, 52);
        break_it(&mut bench.side);
        loop {
            let (header, _) = bench.side.receive();
            assert_eq!((header.to.1, header.from.1), (1000, 52));
            if header.operation == RESET {
                break;
            }
            assert_eq!(header.operation, CREDIT_UPDATE, "{what}");
        }
        while !bench.side.is_quiet() {
            bench.side.expect(RESET, 1000, 52);
        }
        let mut rest = Vec::new();
        program.read_to_end(&mut rest).unwrap();
    }
    bench.side.send(Header::new(RW, 999, 52), b"unharmed");
    assert_eq!(read_exactly(&mut other, 8), b"unharmed");
    let metrics = bench.end().metrics;
    assert_eq!(metrics["resets"], 4);
}

/// Data that was read of a program, and cannot be given to the guest.
#[test]
fn a_stream_that_has_lost_a_piece_is_none() {
    let (to, programs) = channel();
    let mut bench = Bench::with(operator(to), programs, 1);
    let mut program = bench.connect(1000, 52);
    // The next buffer is the device's to write no more; those behind it are.
    let side = &mut bench.side;
    let heads: Vec<u16> = (1..4).collect();
    for head in &heads {
        let buffer = side.driver.buffer(HEADER + DATA, *head != 2);
        let len = u32::try_from(buffer.len).unwrap();
        side.receives
            .set_descriptor(*head, buffer.address(), len, WRITE, 0);
        side.buffers.push(buffer);
    }
    side.receives.offer_together(&heads);
    side.driver.notify(RECEIVE);
    program.write_all(b"one").unwrap();
    assert_eq!(bench.side.receive().1, b"one");
    program.write_all(b"two").unwrap();
    assert_eq!(bench.side.receive().1, b"two");
    program.write_all(b"three").unwrap();
    assert!(bench.side.has_received());
    assert_eq!(bench.side.receives.used(bench.side.received), (2, 0));
    bench.side.received += 1;
    bench.side.expect(RESET, 1000, 52);
    assert!(is_at_end(&mut program));
    let report = bench.end();
    assert_eq!(report.metrics["resets"], 1);
}

#[test]
fn buffers_that_hold_no_data_come_back_empty_and_others_are_used() {
    let (to, programs) = channel();
    let mut bench = Bench::with(operator(to), programs, 0);
    bench.side.send(Header::new(REQUEST, 1000, 52), &[]);
    for len in [1, HEADER - 1, HEADER] {
        bench.side.post(len);
    }
    assert!(
        bench
            .side
            .driver
            .wait(|| bench.side.receives.used_index() == 3)
    );
    for index in 0..3 {
        assert_eq!(bench.side.receives.used(index).1, 0);
    }
    bench.side.received = 3;
    // One byte of data a packet.
    for _ in 0..4 {
        bench.side.post(HEADER + 1);
    }
    bench.side.expect(RESPONSE, 1000, 52);
    let mut program = bench.programs.recv().unwrap();
    program.write_all(b"slow").unwrap();
    assert_eq!(bench.side.receive_data(4), b"slow");
    bench.end();
}

/// Answers wait for buffers, and packets for answers: a guest makes dom0 hold no more than so many.
#[test]
fn a_guest_that_takes_no_answers_is_heard_no_more() {
    let (to, programs) = channel();
    let mut bench = Bench::with(operator(to), programs, 0);
    let mut taken = 0;
    for port in 0..200 {
        let before = bench.side.sends.used_index();
        let packet = Header::new(RW, port, 6).to_bytes();
        let buffer = bench.side.offer(&packet);
        bench.side.driver.settle();
        if bench.side.sends.used_index() == before {
            // It waits; so does who sent it.
            taken = port;
            std::mem::forget(buffer);
            break;
        }
    }
    assert_eq!(taken, 64);
    for _ in 0..SIZE {
        bench.side.post(HEADER + DATA);
    }
    for port in 0..=taken {
        bench.side.expect(RESET, port, 6);
    }
    bench.end();
}

/// Answers its dials when there are as many as there may be; `asked` counts them.
fn slow(to: Sender<UnixStream>, asked: Arc<AtomicU32>) -> Arc<Mutex<Operator>> {
    let mut held = Vec::new();
    Arc::new(Mutex::new(move |board: &Switchboard, number, _| {
        asked.fetch_add(1, Ordering::SeqCst);
        held.push(number);
        if held.len() == Dial::MOST {
            for number in held.drain(..) {
                let (ours, theirs) = stream();
                board.dialled(number, Some(theirs.into()));
                to.send(ours).unwrap();
            }
        }
        true
    }))
}

#[test]
fn what_is_dialled_beyond_the_most_waits() {
    let (to, programs) = channel();
    let asked = Arc::new(AtomicU32::new(0));
    let operator = slow(to, Arc::clone(&asked));
    let mut bench = Bench::with(operator, programs, usize::from(SIZE));
    for port in 0..10 {
        bench.side.send(Header::new(REQUEST, port, 53), &[]);
    }
    // Linux says this whenever its program sets a size.
    bench.side.send(Header::new(CREDIT_UPDATE, 3, 53), &[]);
    // One that the guest has given up.
    bench.side.send(Header::new(RESET, 0, 53), &[]);
    assert!(bench.side.is_quiet());
    // Ten more at once: of the last four, which wait, the guest gives up one.
    let side = &mut bench.side;
    let mut packets: Vec<_> = (10..20)
        .map(|port| Header::new(REQUEST, port, 53))
        .collect();
    packets.push(Header::new(RESET, 19, 53));
    let (mut buffers, mut heads) = (Vec::new(), Vec::new());
    for (head, packet) in (0..).zip(packets) {
        let buffer = side.driver.buffer(HEADER, false);
        buffer.write(0, &packet.to_bytes());
        side.sends.set_descriptor(head, buffer.address(), 44, 0, 0);
        buffers.push(buffer);
        heads.push(head);
    }
    side.sends.offer_together(&heads);
    side.driver.notify(SEND);
    let mut answered: Vec<_> = (0..15).map(|_| side.receive().0.to.1).collect();
    answered.sort_unstable();
    assert_eq!(answered, (1..16).collect::<Vec<_>>());
    // Once the others are answered, those that waited have their turn.
    assert!(side.is_quiet());
    assert_eq!(asked.load(Ordering::SeqCst), 19);
    let report = bench.end();
    assert_eq!(
        (report.metrics["refused"], report.metrics["connections"]),
        (0, 15)
    );
}

#[test]
fn connections_have_their_most() {
    let mut bench = Bench::new();
    let programs: Vec<_> = (0..256).map(|port| bench.connect(port, 52)).collect();
    bench.side.send(Header::new(REQUEST, 256, 52), &[]);
    bench.side.expect(RESET, 256, 52);
    drop(programs);
    for _ in 0..256 {
        let (header, _) = bench.side.receive();
        assert_eq!(header.operation, SHUTDOWN);
        bench.side.send(Header::new(RESET, header.to.1, 52), &[]);
    }
    drop(bench.connect(256, 52));
    bench.end();
}

#[test]
fn a_packet_of_another_kind_ends_the_connection_that_has_its_ports() {
    let mut bench = Bench::new();
    for foreign in [
        Header {
            kind: 2,
            ..Header::new(RW, 1000, 52)
        },
        Header::new(9, 1000, 52),
    ] {
        let mut program = bench.connect(1000, 52);
        bench.side.send(foreign, &[]);
        bench.side.expect(RESET, 1000, 52);
        assert!(is_at_end(&mut program));
    }
    assert_eq!(bench.end().metrics["resets"], 2);
}

#[test]
fn a_packet_may_come_in_any_pieces() {
    let mut bench = Bench::new();
    let mut program = bench.connect(1000, 52);
    let header = Header {
        len: 100,
        ..Header::new(RW, 1000, 52)
    };
    let data = numbered(100);
    let packet = [header.to_bytes(), data.clone()].concat();
    for pieces in [
        vec![44, 100],
        vec![1, 43, 100],
        vec![40, 50, 54],
        vec![48; 3],
        vec![9; 16],
    ] {
        let side = &mut bench.side;
        let before = side.sends.used_index();
        let mut buffers = Vec::new();
        let mut at = 0;
        for (place, len) in (0..).zip(&pieces) {
            let buffer = side.driver.buffer(*len, false);
            buffer.write(0, &packet[at..at + len]);
            at += len;
            let flags = if at == packet.len() { 0 } else { NEXT };
            let len = u32::try_from(*len).unwrap();
            side.sends
                .set_descriptor(place, buffer.address(), len, flags, place + 1);
            buffers.push(buffer);
        }
        assert_eq!(at, packet.len());
        side.sends.offer(0);
        side.driver.notify(SEND);
        assert!(side.driver.wait(|| side.sends.used_index() != before));
        assert_eq!(read_exactly(&mut program, 100), data);
    }
    bench.end();
}

#[test]
fn a_queue_that_stops_ends_all_connections() {
    for index in [RECEIVE, SEND] {
        let mut bench = Bench::new();
        let mut program = bench.connect(1000, 52);
        bench.side.driver.write(Register::QueueSel, index);
        bench.side.driver.write(Register::QueueReady, 0);
        assert!(is_at_end(&mut program), "{index}");
        bench.end();
    }
}

#[test]
fn a_reset_ends_all_connections_and_the_next_driver_begins_anew() {
    let mut bench = Bench::new();
    let mut program = bench.connect(1000, 52);
    let mut visitor = bench.visit();
    bench.side.driver.write(Register::Status, 0);
    assert!(is_at_end(&mut program) && is_at_end(&mut visitor));
    let driver = driver(&bench.guest, 0);
    bench.side = Side::start(driver, usize::from(SIZE));
    assert!(bench.side.is_quiet());
    let mut program = bench.connect(1000, 52);
    bench.side.send(Header::new(RW, 1000, 52), b"anew");
    assert_eq!(read_exactly(&mut program, 4), b"anew");
    bench.end();
}
