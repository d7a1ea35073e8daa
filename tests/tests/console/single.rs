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
fn a_request_may_be_larger_than_all_that_is_kept() {
    let (mut client, line) = stream();
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut writes] = bench.start([WRITES]);
    let written = numbered(KEPT + 100_000);
    let newest = written[written.len() - KEPT..].to_vec();
    let reader = thread::spawn(move || {
        let mut read = Vec::new();
        while !read.ends_with(&newest) {
            let mut bytes = [0; 4096];
            let len = client.read(&mut bytes).unwrap();
            read.extend(&bytes[..len]);
        }
    });
    let half = written.len() / 2;
    let pieces = [half, written.len() - half];
    write(driver, &mut writes, WRITES, &written, &pieces);
    reader.join().unwrap();
    // What is not readable comes back as well.
    let buffer = driver.buffer(64, true);
    writes.set_descriptor(0, buffer.address(), 64, WRITE, 0);
    writes.offer(0);
    driver.notify(WRITES);
    assert!(driver.wait(|| writes.used_index() == 2));
    bench.end();
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
fn output_is_kept_once_over_deaths() {
    let written = numbered(24_000);
    let make = |records: &DeviceRecords<'_>| attached(inherited(&[None], records), vec![]);
    let before = steps_before(&(Arc::new(make) as Arc<MakeDevice>));
    let mut died = 0;
    for death in (100..2500).step_by(61) {
        let clients = Arc::new(Mutex::new(Vec::new()));
        let attached_to = Arc::clone(&clients);
        let make = move |records: &DeviceRecords<'_>| {
            let (client, line) = messages(None);
            attached_to.lock().unwrap().push(client);
            attached(inherited(&[None], records), vec![(0, line)])
        };
        let make: Arc<MakeDevice> = Arc::new(make);
        let written = written.clone();
        let deaths = [before + death, 300 + death % 97, 500 + death % 89];
        died += drive_over_deaths(&deaths, 0, &make, move |guest| {
            let driver = driver(guest, 0);
            let [mut writes] = start(&driver, [WRITES]);
            for (queued, piece) in (1..).zip(written.chunks(160)) {
                let _buffers = offer(&driver, &mut writes, WRITES, piece, &[piece.len()]);
                assert!(driver.wait(|| writes.used_index() == queued));
            }
            // Who comes last is shown all of it.
            let last = clients.lock().unwrap().pop().unwrap();
            assert_eq!(receive(&last), 0u64.to_le_bytes());
            let mut read = Vec::new();
            while read.len() < written.len() {
                read.extend(receive(&last));
            }
            assert!(read == written);
        });
    }
    assert!(died > 60, "{died}");
}

#[test]
fn a_worker_that_never_sleeps_shows_what_was_written_all_the_same() {
    let (mut client, line) = stream();
    let (mut machine, guest) = by_hand(&[None], vec![(0, line)]);
    let _queues = drive(&mut machine, &guest, |driver| {
        let [mut writes] = start(driver, [WRITES]);
        write(driver, &mut writes, WRITES, b"# ", &[2]);
        writes
    });
    for _ in 0..64 {
        machine.step();
    }
    assert_eq!(read_exactly(&mut client, 2), b"# ");
}

#[test]
fn the_last_words_of_a_driver_that_goes_are_shown() {
    let (mut client, line) = stream();
    let (mut machine, guest) = by_hand(&[None], vec![(0, line)]);
    drive(&mut machine, &guest, |driver| {
        let [mut writes] = start(driver, [WRITES]);
        write(driver, &mut writes, WRITES, b"oops", &[4]);
        driver.write(Register::Status, 0);
    });
    assert_eq!(read_exactly(&mut client, 4), b"oops");
    // Who comes and goes meanwhile makes room for others.
    drop(client);
    machine.step();
    assert!(machine.prepare_sleep().unwrap() < Activity::Working);
    assert_eq!(machine.try_again_at(), None);
}

#[test]
fn clients_come_and_go_though_there_is_no_driver() {
    let mut device = console(vec![None]);
    for round in 0..40 {
        let (client, line) = messages(None);
        device.attaching().attach(0, line);
        device.update();
        assert_eq!(receive(&client), 0u64.to_le_bytes());
        if round > 0 {
            assert_eq!(receive(&client).len(), round);
        }
        device.write_config(8, b"x");
        assert!(device.settle());
        assert_eq!(receive(&client), b"x");
        drop(client);
        assert!(device.settle());
    }
}

#[test]
fn a_driver_without_ports_is_asked_for_nothing_of_them() {
    let (mut machine, guest) = by_hand(&[None, Some("agent")], vec![]);
    let _queues = drive(&mut machine, &guest, |driver| {
        let offered = driver.offered_features();
        assert_eq!(driver.negotiate(offered & !2), Negotiated::Accepted);
        let queues = [WRITES, TELLS, HEARS].map(|index| {
            let queue = RawQueue::new(driver, SIZE);
            driver.start_queue(index, SIZE.into(), queue.addresses());
            queue
        });
        driver.driver_ok();
        let [mut writes, tells, mut hears] = queues;
        write(driver, &mut writes, WRITES, b"x", &[1]);
        let waits = offer(driver, &mut hears, HEARS, &[0; 8], &[8]);
        (writes, tells, hears, waits)
    });
    come_to_rest(&mut machine);
    sleeps(&mut machine);
}

#[test]
fn what_a_client_has_said_before_it_went_reaches_the_guest() {
    let said = numbered(30_000);
    let (mut client, line) = stream();
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut reads] = bench.start([READS]);
    client.write_all(&said).unwrap();
    drop(client);
    driver.settle();
    let buffers = post(driver, &mut reads, READS, &[4096; 10]);
    let mut read: Vec<u8> = Vec::new();
    while read.len() < said.len() {
        let next = reads.used_index();
        read.clear();
        for index in 0..next {
            let (head, written) = reads.used(index);
            read.extend(&buffers[head as usize].read()[..written as usize]);
        }
        assert!(read.len() == said.len() || driver.wait(|| reads.used_index() > next));
    }
    assert!(read == said);
    bench.end();
}

#[test]
fn what_a_client_has_said_reaches_the_guest_though_it_never_read() {
    type Visit = fn() -> (Box<dyn FnOnce()>, Line);
    let visits: [Visit; 2] = [
        || {
            let (mut client, line) = stream();
            (Box::new(move || client.write_all(b"said").unwrap()), line)
        },
        || {
            let (client, line) = messages(None);
            (Box::new(move || say(&client, b"\0said")), line)
        },
    ];
    // One is gone before it is attached, and one has left unread what the console has written.
    for (visit, leaves_first) in visits
        .into_iter()
        .flat_map(|one| [(one, true), (one, false)])
    {
        let mut device = console(vec![None]);
        device.write_config(8, b"x");
        let attaching = device.attaching();
        let (mut machine, guest, slot) = served(Box::new(device));
        let (reads, buffer) = drive(&mut machine, &guest, |driver| {
            let [mut reads] = start(driver, [READS]);
            let buffer = post(driver, &mut reads, READS, &[16]).remove(0);
            (reads, buffer)
        });
        let (say_and_leave, line) = visit();
        let take_up = |device: &mut GuestDevices<SimHypervisor>| {
            device.device_mut(slot).unwrap().update();
        };
        attaching.attach(0, line);
        if leaves_first {
            say_and_leave();
            take_up(&mut machine);
        } else {
            take_up(&mut machine);
            say_and_leave();
        }
        come_to_rest(&mut machine);
        assert_eq!(reads.used_index(), 1, "leaves first: {leaves_first}");
        assert_eq!(buffer.read()[..4], *b"said");
        sleeps(&mut machine);
    }
}

#[test]
fn each_that_says_something_has_its_turn() {
    let (mut loud, line) = stream();
    let (mut quiet, quiet_line) = stream();
    let bench = Bench::new(&[None], vec![(0, line), (0, quiet_line)]);
    let driver = &bench.driver;
    let [mut reads] = bench.start([READS]);
    loud.set_nonblocking(true).unwrap();
    while loud.write(&[b'x'; 4096]).is_ok() {}
    quiet.write_all(b"me too").unwrap();
    let buffers = post(driver, &mut reads, READS, &[4096; 3]);
    assert!(driver.wait(|| reads.used_index() == 3), "nothing came");
    let came = |buffer: &Buffer| buffer.read()[..6] == *b"me too";
    assert_eq!(buffers.iter().filter(|buffer| came(buffer)).count(), 1);
    bench.end();
}

#[test]
fn who_listens_no_more_may_go_on_talking() {
    let (mut client, line) = stream();
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut reads, mut writes] = bench.start([READS, WRITES]);
    client.shutdown(std::net::Shutdown::Read).unwrap();
    for (index, said) in [b"first", b"later"].into_iter().enumerate() {
        write(driver, &mut writes, WRITES, b"# ", &[2]);
        driver.settle();
        client.write_all(said).unwrap();
        let buffer = driver.buffer(8, true);
        let index = u16::try_from(index).unwrap();
        reads.set_descriptor(index, buffer.address(), 8, WRITE, 0);
        reads.offer(index);
        driver.notify(READS);
        expect(driver, &reads, index, &buffer, said);
    }
    bench.end();
}

#[test]
fn a_client_of_messages_that_is_too_slow_begins_anew() {
    let (client, line) = messages(None);
    let bench = Bench::new(&[None], vec![(0, line)]);
    let driver = &bench.driver;
    let [mut reads, mut writes] = bench.start([READS, WRITES]);
    let written = numbered(2 << 20);
    for piece in written.chunks(60_000) {
        write(driver, &mut writes, WRITES, piece, &[piece.len()]);
    }
    // What it has is without a gap; then the connection ends.
    assert_eq!(receive(&client), 0u64.to_le_bytes());
    let mut read = Vec::new();
    loop {
        let message = receive(&client);
        if message.is_empty() {
            break;
        }
        read.extend(message);
    }
    assert!(read.len() < written.len() && read == written[..read.len()]);
    // What it says as it does not know of that is the guest's still.
    say(&client, b"\0said");
    let buffer = post(driver, &mut reads, READS, &[16]).remove(0);
    expect(driver, &reads, 0, &buffer, b"said");
    bench.end();
}

#[test]
fn who_is_gone_and_has_not_been_read_keeps_nobody_out() {
    let device = console(vec![None]);
    let attaching = device.attaching();
    let (mut machine, guest, slot) = served(Box::new(device));
    let _queues = drive(&mut machine, &guest, |driver| {
        start(driver, [READS, WRITES])
    });
    let mut attach = |line: Line| {
        attaching.attach(0, line);
        machine.device_mut(slot).unwrap().update();
        come_to_rest(&mut machine);
    };
    for _ in 0..20 {
        let (mut client, line) = stream();
        client.write_all(&[b'x'; 8000]).unwrap();
        attach(line);
        drop(client);
    }
    let (client, line) = messages(None);
    attach(line);
    assert_eq!(receive(&client), 0u64.to_le_bytes());
}
