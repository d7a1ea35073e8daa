//! One console, whose driver needs no control queues.

use super::*;

#[test]
fn what_either_side_writes_reaches_the_other() {
    let (mut client, line) = stream();
    let (mut log, log_line) = log();
    let bench = Bench::new(&[None], vec![(0, line), (0, log_line)]);
    let driver = &bench.driver;
    let [mut reads, mut writes] = bench.start([READS, WRITES]);
    write(driver, &mut writes, WRITES, b"hello, world", &[1, 0, 7, 4]);
    assert_eq!(read_exactly(&mut client, 12), b"hello, world");
    assert_eq!(read_exactly(&mut log, 12), b"hello, world");
    let buffers = post(driver, &mut reads, READS, &[4, 64, 1, 64]);
    client.write_all(b"and back").unwrap();
    expect(driver, &reads, 0, &buffers[0], b"and ");
    expect(driver, &reads, 1, &buffers[1], b"back");
    client.write_all(b"more").unwrap();
    expect(driver, &reads, 2, &buffers[2], b"m");
    expect(driver, &reads, 3, &buffers[3], b"ore");
    // What the guest has no buffer for waits.
    client.write_all(b"later").unwrap();
    driver.settle();
    let buffer = driver.buffer(8, true);
    reads.set_descriptor(4, buffer.address(), 8, WRITE, 0);
    reads.offer(4);
    driver.notify(READS);
    expect(driver, &reads, 4, &buffer, b"later");
    let metrics = bench.end().metrics;
    assert_eq!((metrics["output_bytes"], metrics["input_bytes"]), (12, 17));
}

#[test]
fn a_guest_waits_for_no_reader_and_the_newest_is_kept_for_one_that_comes_back() {
    let (mut client, line) = stream();
    let (mut log, log_line) = log();
    let bench = Bench::new(&[None], vec![(0, line), (0, log_line)]);
    let driver = &bench.driver;
    let [mut writes] = bench.start([WRITES]);
    let written = numbered(2 << 20);
    for piece in written.chunks(30_000) {
        write(driver, &mut writes, WRITES, piece, &[piece.len()]);
    }
    // Each has what there was room for at the beginning, then the newest.
    let newest = &written[written.len() - KEPT..];
    for reader in [&mut client as &mut dyn Read, &mut log] {
        let mut read = Vec::new();
        while !read.ends_with(&written[written.len() - 8..]) {
            let mut bytes = [0; 4096];
            let len = reader.read(&mut bytes).unwrap();
            read.extend(&bytes[..len]);
        }
        assert!(read.ends_with(newest));
        let before = read.len() - KEPT;
        assert!(read[..before] == written[..before]);
    }
    let metrics = bench.end().metrics;
    assert!(
        metrics["unread_bytes"] > 0 && metrics["unlogged_bytes"] > 0,
        "{metrics:?}"
    );
    assert_eq!(metrics["output_bytes"], written.len() as u64);
}

#[test]
fn a_log_takes_a_megabyte_a_second_after_a_burst() {
    let (mut log, line) = log();
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut writes] = bench.start([WRITES]);
    let reader = thread::spawn(move || {
        let mut read = 0;
        let mut bytes = [0; 1 << 16];
        while let Ok(len @ 1..) = log.read(&mut bytes) {
            read += len;
        }
        read
    });
    let began = Instant::now();
    let _buffers = offer(driver, &mut writes, WRITES, &numbered(64_000), &[64_000]);
    for written in 1.. {
        assert!(driver.wait(|| writes.used_index() == written));
        if began.elapsed() > Duration::from_secs(1) {
            break;
        }
        writes.offer(0);
        driver.notify(WRITES);
    }
    let elapsed = began.elapsed();
    let metrics = bench.end().metrics;
    let logged = reader.join().unwrap();
    let allowed = KEPT + usize::try_from(elapsed.as_millis()).unwrap() * (1 << 20) / 1000;
    assert!(logged <= allowed + allowed / 10, "{logged} of {allowed}");
    assert!(logged >= allowed / 2, "{logged} of {allowed}");
    assert!(
        metrics["output_bytes"] > 2 * logged as u64,
        "it was not limited"
    );
}

#[test]
fn a_request_may_be_larger_than_all_that_is_kept() {
    let (mut client, line) = stream();
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut writes] = bench.start([WRITES]);
    let written = numbered(KEPT + 100_000);
    let reader = thread::spawn(move || {
        let mut read = Vec::new();
        client.read_to_end(&mut read).unwrap();
        read
    });
    let half = written.len() / 2;
    write(
        driver,
        &mut writes,
        WRITES,
        &written,
        &[half, written.len() - half],
    );
    // What is not readable, and nothing at all, come back as well.
    let buffer = driver.buffer(64, true);
    writes.set_descriptor(0, buffer.address(), 64, WRITE, 0);
    writes.offer(0);
    driver.notify(WRITES);
    assert!(driver.wait(|| writes.used_index() == 2));
    driver.settle();
    bench.end();
    let read = reader.join().unwrap();
    assert!(read.ends_with(&written[written.len() - KEPT..]));
}

#[test]
fn a_client_of_messages_goes_on_where_it_was_and_sets_the_size() {
    let written = numbered(20_000);
    let (first, line) = messages(None);
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut reads, mut writes] = bench.start([READS, WRITES]);
    let size = |of: u64| driver.raw_read(0x100 + of, Width::Two);
    assert_eq!((size(0), size(2)), (80, 24));
    write(driver, &mut writes, WRITES, &written, &[written.len()]);
    assert_eq!(receive(&first), 0u64.to_le_bytes());
    let mut read = Vec::new();
    while read.len() < written.len() {
        read.extend(receive(&first));
    }
    assert!(read == written);
    let generation = driver.read(Register::ConfigGeneration);
    say(&first, &[RESIZE, 0x2c, 1, 50, 0]);
    assert!(driver.wait(|| (size(0), size(2)) == (300, 50)));
    assert_ne!(driver.read(Register::ConfigGeneration), generation);
    let buffers = post(driver, &mut reads, READS, &[8, 8]);
    say(&first, &[INPUT]);
    say(&first, &[INPUT, b'o', b'k']);
    expect(driver, &reads, 0, &buffers[0], b"ok");
    // One that says what no client says is gone, and nobody else is.
    say(&first, &[RESIZE, 1]);
    assert!(receive(&first).is_empty());
    bench.end();
}

#[test]
fn a_client_is_told_where_it_begins() {
    for (from, begins) in [(None, 0), (Some(7), 7), (Some(99), 0)] {
        let (client, line) = messages(from);
        let mut device = console(vec![None]);
        // Also what a guest without a driver has written.
        for byte in b"emergency" {
            device.write_config(8, &[*byte, 0, 0, 0]);
        }
        device.write_config(0, b"12345678");
        device.attaching().attach(0, line);
        device.attaching().attach(1, stream().1);
        device.update();
        assert_eq!(receive(&client), u64::to_le_bytes(begins), "{from:?}");
        assert_eq!(
            receive(&client),
            b"emergency"[usize::try_from(begins).unwrap()..]
        );
        // The ninth finds no room.
        let more: Vec<_> = (0..8).map(|_| messages(None)).collect();
        let more: Vec<_> = more
            .into_iter()
            .map(|(client, line)| {
                device.attaching().attach(0, line);
                client
            })
            .collect();
        device.update();
        assert_eq!(receive(&more[6]), 0u64.to_le_bytes());
        assert_eq!(receive(&more[7]), u64::MAX.to_le_bytes());
        assert!(receive(&more[7]).is_empty());
    }
}

#[test]
fn output_is_logged_once_over_deaths_and_typing_goes_on() {
    let written = numbered(24_000);
    for death in (300..3000).step_by(173) {
        let (log, line) = log();
        let line = Arc::new(match line {
            Line::Log(pipe) => pipe,
            _ => unreachable!("a log"),
        });
        let make = move |records: &DeviceRecords<'_>| {
            let device = inherited(&[None], records);
            attached(device, vec![(0, Line::Log(line.try_clone().unwrap()))])
        };
        let make: Arc<MakeDevice> = Arc::new(make);
        let expected = written.clone();
        let reader = thread::spawn(move || {
            let mut log = log;
            let read = read_exactly(&mut log, expected.len());
            assert!(read == expected, "{:?}", String::from_utf8_lossy(&read));
        });
        let all = written.clone();
        drive_over_deaths(&[death, death / 2, death], 0, &make, move |guest| {
            let driver = driver(guest, 0);
            let [mut writes] = start(&driver, [WRITES]);
            for (queued, piece) in (1..).zip(all.chunks(160)) {
                let _buffers = offer(&driver, &mut writes, WRITES, piece, &[piece.len()]);
                assert!(driver.wait(|| writes.used_index() == queued));
            }
            // Whoever is left hands over the rest.
            reader.join().unwrap();
        });
    }
}
