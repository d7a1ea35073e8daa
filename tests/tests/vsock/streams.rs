//! What well-behaved guests and programs say to each other.

use super::*;
use std::net::Shutdown;
use std::thread;

#[test]
fn a_guest_reaches_a_program_and_the_other_way_round() {
    let mut bench = Bench::new();
    let cid = |of: u64| bench.side.driver.raw_read(0x100 + of, Width::Four);
    assert_eq!((cid(0), cid(4)), (CID, 0));
    let mut program = bench.connect(1000, 52);
    bench.side.send(Header::new(RW, 1000, 52), b"hello, ");
    bench.side.send(Header::new(RW, 1000, 52), b"host");
    assert_eq!(read_exactly(&mut program, 11), b"hello, host");
    program.write_all(b"hello, guest").unwrap();
    assert_eq!(bench.side.receive_data(12), b"hello, guest");

    let mut visitor = bench.visit();
    visitor.write_all(b"CONNECT 80\nat once").unwrap();
    let (request, _) = bench.side.receive();
    assert_eq!((request.operation, request.to.1), (REQUEST, 80));
    let host = request.from.1;
    assert!(host >= 1 << 30);
    // Nothing goes by before the guest has accepted.
    assert!(bench.side.is_quiet());
    bench.side.send(Header::new(RESPONSE, 80, host), &[]);
    let answer = format!("OK {host}\n");
    assert_eq!(
        read_exactly(&mut visitor, answer.len()),
        answer.into_bytes()
    );
    assert_eq!(bench.side.receive_data(7), b"at once");
    bench.side.send(Header::new(RW, 80, host), b"and back");
    assert_eq!(read_exactly(&mut visitor, 8), b"and back");
    let metrics = bench.end().metrics;
    let counted =
        ["connections", "sent_bytes", "received_bytes", "resets"].map(|name| metrics[name]);
    assert_eq!(counted, [2, 19, 19, 0]);
}

#[test]
fn either_side_ends_one_direction_or_both() {
    let mut bench = Bench::new();
    // The program first, and half.
    let mut program = bench.connect(1000, 52);
    program.write_all(b"last").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.side.receive_data(4), b"last");
    assert_eq!(bench.side.expect(SHUTDOWN, 1000, 52).flags, NO_MORE_SENDING);
    bench.side.send(Header::new(RW, 1000, 52), b"more");
    assert_eq!(read_exactly(&mut program, 4), b"more");
    let done = |flags| Header {
        flags,
        ..Header::new(SHUTDOWN, 1000, 52)
    };
    // Then the guest, half and whole.
    bench.side.send(done(NO_MORE_SENDING), &[]);
    assert!(is_at_end(&mut program) && bench.side.is_quiet());
    bench.side.send(done(NO_MORE_RECEIVING), &[]);
    bench.side.expect(RESET, 1000, 52);
    // The guest first, at once.
    let mut program = bench.connect(1001, 52);
    bench.side.send(Header::new(RW, 1001, 52), b"last");
    let all = NO_MORE_RECEIVING | NO_MORE_SENDING;
    let shutdown = Header {
        flags: all,
        ..Header::new(SHUTDOWN, 1001, 52)
    };
    bench.side.send(shutdown, &[]);
    assert_eq!(read_exactly(&mut program, 4), b"last");
    assert!(is_at_end(&mut program));
    bench.side.expect(RESET, 1001, 52);
    // The program is gone, with something for the guest on its way.
    let mut program = bench.connect(1002, 52);
    program.write_all(b"last").unwrap();
    drop(program);
    assert_eq!(bench.side.receive_data(4), b"last");
    assert_eq!(bench.side.expect(SHUTDOWN, 1002, 52).flags, all);
    // What comes then is for nobody, and no fault.
    bench.side.send(Header::new(RW, 1002, 52), b"more");
    bench.side.send(Header::new(RESET, 1002, 52), &[]);
    assert!(bench.side.is_quiet());
    // Half first, and gone later.
    let program = bench.connect(1003, 52);
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.side.expect(SHUTDOWN, 1003, 52).flags, NO_MORE_SENDING);
    drop(program);
    assert_eq!(bench.side.expect(SHUTDOWN, 1003, 52).flags, all);
    assert_eq!(bench.end().metrics["resets"], 0);
}

#[test]
fn who_is_not_there_or_does_not_want_is_said_at_once() {
    let mut bench = Bench::new();
    bench.side.send(Header::new(REQUEST, 1000, NOBODY), &[]);
    bench.side.expect(RESET, 1000, NOBODY);
    let mut visitor = bench.visit();
    visitor.write_all(b"CONNECT 80\n").unwrap();
    let (request, _) = bench.side.receive();
    bench.side.send(Header::new(RESET, 80, request.from.1), &[]);
    assert!(is_at_end(&mut visitor));
    let mut visitor = bench.visit();
    visitor.write_all(b"GET / HTTP/1.1\n").unwrap();
    assert!(is_at_end(&mut visitor) && bench.side.is_quiet());
    // One that is gone before the guest answers.
    let mut visitor = bench.visit();
    visitor.write_all(b"CONNECT 81\n").unwrap();
    let (request, _) = bench.side.receive();
    drop(visitor);
    bench.side.expect(RESET, 81, request.from.1);
    bench
        .side
        .send(Header::new(RESPONSE, 81, request.from.1), &[]);
    bench.side.expect(RESET, 81, request.from.1);
    bench.end();
}

#[test]
fn as_much_is_sent_to_the_guest_as_it_has_room_for() {
    let mut bench = Bench::new();
    let wanted = Header {
        buffer: 10_000,
        ..Header::new(REQUEST, 1000, 52)
    };
    bench.side.send(wanted, &[]);
    bench.side.expect(RESPONSE, 1000, 52);
    let mut program = bench.programs.recv().unwrap();
    let sent = numbered(25_000);
    program.write_all(&sent).unwrap();
    let mut received = bench.side.receive_data(10_000);
    assert_eq!(received.len(), 10_000);
    bench.side.expect(CREDIT_REQUEST, 1000, 52);
    assert!(bench.side.is_quiet());
    let update = |forwarded| Header {
        buffer: 10_000,
        forwarded,
        ..Header::new(CREDIT_UPDATE, 1000, 52)
    };
    bench.side.send(update(3000), &[]);
    received.extend(bench.side.receive_data(3000));
    assert_eq!(received.len(), 13_000);
    bench.side.expect(CREDIT_REQUEST, 1000, 52);
    // It says no more than it has said.
    bench.side.send(update(3000), &[]);
    assert!(bench.side.is_quiet());
    bench.side.send(update(13_000), &[]);
    received.extend(bench.side.receive_data(10_000));
    bench.side.expect(CREDIT_REQUEST, 1000, 52);
    bench.side.send(update(23_000), &[]);
    received.extend(bench.side.receive_data(2000));
    assert!(received == sent);
    bench.end();
}

#[test]
fn what_a_program_does_not_read_waits_and_the_guest_learns_of_the_room() {
    let mut bench = Bench::new();
    let mut program = bench.connect(1000, 52);
    // Another one, whose program reads, does not wait for it.
    let mut other = bench.connect(1001, 52);
    let sent = numbered(4 << 20);
    let (mut at, mut forwarded) = (0, 0u32);
    while sent.len() > at {
        let held = at - forwarded as usize;
        let len = (HELD - held).min(60_000).min(sent.len() - at);
        if len == 0 {
            break;
        }
        bench
            .side
            .send(Header::new(RW, 1000, 52), &sent[at..at + len]);
        at += len;
        while !bench.side.is_quiet() {
            forwarded = bench.side.expect(CREDIT_UPDATE, 1000, 52).forwarded;
        }
    }
    // What the socket holds was passed on, and no more.
    assert!(
        at < sent.len() && at - forwarded as usize == HELD,
        "{at} {forwarded}"
    );
    bench.side.send(Header::new(CREDIT_REQUEST, 1000, 52), &[]);
    let credit = bench.side.expect(CREDIT_UPDATE, 1000, 52);
    assert_eq!(
        (credit.buffer as usize, credit.forwarded),
        (HELD, forwarded)
    );
    bench.side.send(Header::new(RW, 1001, 52), b"still here");
    assert_eq!(read_exactly(&mut other, 10), b"still here");
    assert!(read_exactly(&mut program, at) == sent[..at]);
    let mut last = forwarded;
    while last as usize != at {
        let (header, _) = bench.side.receive();
        assert_eq!((header.operation, header.to.1), (CREDIT_UPDATE, 1000));
        last = header.forwarded;
        if at - (last as usize) < HELD / 4 {
            break;
        }
    }
    // One byte more than it may have under way.
    drop(program);
    bench.end();
}

#[test]
fn what_a_guest_has_sent_before_it_ended_arrives() {
    let mut bench = Bench::new();
    let sent = numbered(1 << 20);
    for (guest, waits) in [(1000, false), (1001, true)] {
        let mut program = bench.connect(guest, 52);
        let mut at = 0;
        // Until it is not taken at once any more, and some beyond.
        let mut forwarded = 0;
        while at - forwarded < 65_000 {
            bench
                .side
                .send(Header::new(RW, guest, 52), &sent[at..at + 16_000]);
            at += 16_000;
            while !bench.side.is_quiet() {
                forwarded = bench.side.expect(CREDIT_UPDATE, guest, 52).forwarded as usize;
            }
        }
        let shutdown = Header {
            flags: NO_MORE_RECEIVING | NO_MORE_SENDING,
            ..Header::new(SHUTDOWN, guest, 52)
        };
        bench.side.send(shutdown, &[]);
        assert!(bench.side.is_quiet());
        if waits {
            // Linux gives up after some seconds.
            bench.side.send(Header::new(RESET, guest, 52), &[]);
        }
        assert!(read_exactly(&mut program, at) == sent[..at]);
        assert!(is_at_end(&mut program));
        if !waits {
            while bench.side.receive().0.operation != RESET {}
        }
    }
    bench.end();
}

#[test]
fn who_writes_to_a_guest_that_reads_no_more_does_not_wait_for_it() {
    let mut bench = Bench::new();
    for (guest, flags) in [
        (1000, NO_MORE_RECEIVING),
        (1001, NO_MORE_RECEIVING | NO_MORE_SENDING),
    ] {
        let program = bench.connect(guest, 52);
        let mut writes = program.try_clone().unwrap();
        let writing = thread::spawn(move || while writes.write_all(&[0; 4096]).is_ok() {});
        // More than it takes, since it does not read.
        let mut forwarded = 0;
        let mut at = 0;
        while at - forwarded < 65_000 {
            bench.side.send(Header::new(RW, guest, 52), &[0; 16_000]);
            at += 16_000;
            while !bench.side.is_quiet() {
                let (header, _) = bench.side.receive();
                forwarded = header.forwarded as usize;
            }
        }
        let shutdown = Header {
            flags,
            ..Header::new(SHUTDOWN, guest, 52)
        };
        bench.side.send(shutdown, &[]);
        writing.join().unwrap();
        bench.side.send(Header::new(RESET, guest, 52), &[]);
        drop(program);
        while !bench.side.is_quiet() {
            bench.side.receive();
        }
    }
    // The guest reads no more, and learns that the program is gone.
    let program = bench.connect(1002, 52);
    let end = Header {
        flags: NO_MORE_RECEIVING,
        ..Header::new(SHUTDOWN, 1002, 52)
    };
    bench.side.send(end, &[]);
    assert!(bench.side.is_quiet());
    drop(program);
    assert_eq!(
        bench.side.expect(SHUTDOWN, 1002, 52).flags,
        NO_MORE_RECEIVING
    );
    bench.end();
}

#[test]
fn what_a_guest_has_sent_and_ended_arrives_also_when_its_driver_goes() {
    let mut bench = Bench::new();
    let mut program = bench.connect(1000, 52);
    let mut other = bench.connect(1001, 52);
    let sent = numbered(400_000);
    let (mut at, mut forwarded) = (0, 0);
    while at - forwarded < 65_000 {
        let packet = &sent[at..at + 16_000];
        bench.side.send(Header::new(RW, 1000, 52), packet);
        at += 16_000;
        while !bench.side.is_quiet() {
            forwarded = bench.side.expect(CREDIT_UPDATE, 1000, 52).forwarded as usize;
        }
    }
    let end = Header {
        flags: NO_MORE_RECEIVING | NO_MORE_SENDING,
        ..Header::new(SHUTDOWN, 1000, 52)
    };
    bench.side.send(end, &[]);
    bench.side.driver.write(Register::Status, 0);
    assert!(is_at_end(&mut other));
    assert!(read_exactly(&mut program, at) == sent[..at]);
    assert!(is_at_end(&mut program));
    bench.end();
}

#[test]
fn much_goes_both_ways_by_several_connections_at_once() {
    let mut bench = Bench::new();
    let sent = Arc::new(numbered(3 << 20));
    let ports = [1000, 1001, 1002];
    let programs = ports.map(|port| bench.connect(port, 52));
    let programs: Vec<_> = programs
        .into_iter()
        .map(|mut program| {
            program.set_read_timeout(None).unwrap();
            let sent = Arc::clone(&sent);
            thread::spawn(move || {
                let mut writes = program.try_clone().unwrap();
                let bytes = Arc::clone(&sent);
                let writing = thread::spawn(move || writes.write_all(&bytes).unwrap());
                assert!(read_exactly(&mut program, sent.len()) == **sent);
                writing.join().unwrap();
                program
            })
        })
        .collect();
    let mut at = [0; 3];
    let mut told = [0u32; 3];
    let mut received = [0; 3];
    while received.iter().any(|received| *received < sent.len())
        || at.iter().any(|at| *at < sent.len())
    {
        for index in 0..3 {
            let held = u32::try_from(at[index]).unwrap() - told[index];
            let len = (HELD - held as usize)
                .min(65_536)
                .min(sent.len() - at[index]);
            if len > 0 {
                let header = Header {
                    forwarded: u32::try_from(received[index]).unwrap(),
                    buffer: 50_000,
                    ..Header::new(RW, ports[index], 52)
                };
                bench.side.send(header, &sent[at[index]..at[index] + len]);
                at[index] += len;
            } else {
                let header = Header {
                    forwarded: u32::try_from(received[index]).unwrap(),
                    buffer: 50_000,
                    ..Header::new(CREDIT_UPDATE, ports[index], 52)
                };
                bench.side.send(header, &[]);
            }
        }
        while !bench.side.is_quiet() {
            let (header, data) = bench.side.receive();
            let index = ports.iter().position(|port| *port == header.to.1).unwrap();
            told[index] = header.forwarded;
            let expected = &sent[received[index]..received[index] + data.len()];
            assert!(data == *expected);
            received[index] += data.len();
        }
    }
    for program in programs {
        program.join().unwrap();
    }
    let metrics = bench.end().metrics;
    let all = 3 * sent.len() as u64;
    assert_eq!(metrics["sent_bytes"], all);
    assert_eq!(metrics["received_bytes"], all);
}
