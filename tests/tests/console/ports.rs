//! Several ports, of which driver and device tell each other by control queues.

use super::*;

const NAMES: [Option<&str>; 3] = [None, Some("agent"), None];
/// The queues of the second port, which is a channel.
const CHANNEL_READS: u32 = 4;
const CHANNEL_WRITES: u32 = 5;

/// A driver's side of the control queues.
struct Control {
    hears: RawQueue,
    tells: RawQueue,
    buffers: Vec<Buffer>,
    /// Messages that were taken.
    taken: u16,
}

impl Control {
    fn new(driver: &Driver, mut tells: RawQueue, hears: RawQueue) -> Self {
        let buffers = post(driver, &mut tells, TELLS, &[32; SIZE as usize]);
        Self {
            hears,
            tells,
            buffers,
            taken: 0,
        }
    }

    fn say(&mut self, driver: &Driver, port: u32, event: u16, value: u16) {
        let message = message(port, event, value, &[]);
        write(driver, &mut self.hears, HEARS, &message, &[8]);
    }

    /// The next message.
    fn next(&mut self, driver: &Driver) -> Vec<u8> {
        assert!(
            driver.wait(|| self.tells.used_index() > self.taken),
            "nothing is told after {}",
            self.taken
        );
        let (head, len) = self.tells.used(self.taken);
        self.taken += 1;
        let head = u16::try_from(head).unwrap();
        let mut bytes = self.buffers[usize::from(head)].read();
        bytes.truncate(len as usize);
        self.tells.offer(head);
        driver.notify(TELLS);
        bytes
    }
}

fn message(port: u32, event: u16, value: u16, behind: &[u8]) -> Vec<u8> {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(behind);
    bytes
}

/// The driver learns of all ports, and opens the second.
fn open_ports(driver: &Driver, control: &mut Control) {
    control.say(driver, u32::MAX, 0, 1);
    for port in 0..3 {
        assert_eq!(control.next(driver), message(port, 1, 1, &[]));
    }
    control.say(driver, 0, 3, 1);
    assert_eq!(control.next(driver), message(0, 4, 1, &[]));
    assert_eq!(control.next(driver), message(0, 6, 1, &[]));
    assert_eq!(control.next(driver), message(0, 5, 1, &[80, 0, 24, 0]));
    control.say(driver, 1, 3, 1);
    assert_eq!(control.next(driver), message(1, 7, 1, b"agent"));
}

#[test]
fn ports_are_told_of_as_the_driver_sets_them_up() {
    let (client, line) = messages(None);
    let bench = Bench::new(&NAMES, vec![(0, line)]);
    let driver = &bench.driver;
    let [tells, hears] = bench.start([TELLS, HEARS]);
    assert_eq!(driver.raw_read(0x104, Width::Four), 3);
    let mut control = Control::new(driver, tells, hears);
    open_ports(driver, &mut control);
    // Nobody is at the channel.
    assert_eq!(control.next(driver), message(1, 6, 0, &[]));
    say(&client, &[RESIZE, 100, 0, 30, 0]);
    assert_eq!(control.next(driver), message(0, 5, 1, &[100, 0, 30, 0]));
    // What makes no sense comes back, and nothing follows.
    for (port, event, value) in [
        (3, 3, 1),
        (u32::MAX, 6, 1),
        (0, 2, 1),
        (0, 99, 1),
        (0, 0, 0),
    ] {
        control.say(driver, port, event, value);
    }
    write(driver, &mut control.hears, HEARS, &[0; 7], &[7]);
    driver.settle();
    assert_eq!(control.tells.used_index(), control.taken);
    let report = bench.end();
    assert_eq!((report.metrics["malformed"], report.request_errors), (6, 6));
}

#[test]
fn a_channel_is_open_while_somebody_is_there_and_loses_nothing() {
    let bench = Bench::new(&NAMES, vec![]);
    drop(bench);
    let (mut client, line) = stream();
    let bench = Bench::new(&NAMES, vec![(1, line)]);
    let driver = &bench.driver;
    let [tells, hears, mut reads, mut writes] =
        bench.start([TELLS, HEARS, CHANNEL_READS, CHANNEL_WRITES]);
    let mut control = Control::new(driver, tells, hears);
    open_ports(driver, &mut control);
    assert_eq!(control.next(driver), message(1, 6, 1, &[]));
    // What it says waits until somebody in the guest has the port open.
    let buffers = post(driver, &mut reads, CHANNEL_READS, &[16]);
    client.write_all(b"question").unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(reads.used_index(), 0);
    control.say(driver, 1, 6, 1);
    expect(driver, &reads, 0, &buffers[0], b"question");
    // The guest waits for a reader that is there, and slow.
    let written = numbered(3 * KEPT);
    let sent = written.clone();
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        let read = read_exactly(&mut client, sent.len());
        assert!(read == sent);
    });
    let began = Instant::now();
    for piece in written.chunks(50_000) {
        write(driver, &mut writes, CHANNEL_WRITES, piece, &[piece.len()]);
    }
    assert!(
        began.elapsed() >= Duration::from_millis(50),
        "it did not wait"
    );
    // With the client, its connection ends.
    reader.join().unwrap();
    assert_eq!(control.next(driver), message(1, 6, 0, &[]));
    let metrics = bench.end().metrics;
    assert_eq!(
        (metrics["unread_bytes"], metrics["output_bytes"]),
        (0, 3 * KEPT as u64)
    );
}

#[test]
fn what_is_told_of_ports_outlives_the_process() {
    let mut died = 0;
    let make = |records: &DeviceRecords<'_>| attached(inherited(&NAMES, records), vec![]);
    let make: Arc<MakeDevice> = Arc::new(make);
    let before = steps_before(&make);
    for death in (20..500).step_by(11) {
        died += drive_over_deaths(&[before + death, 100 + death / 2], 0, &make, |guest| {
            let driver = driver(guest, 0);
            let [tells, hears] = start(&driver, [TELLS, HEARS]);
            let mut control = Control::new(&driver, tells, hears);
            control.say(&driver, 0, 0, 1);
            control.say(&driver, 1, 3, 1);
            control.say(&driver, 2, 3, 1);
            let mut expected = vec![
                message(0, 1, 1, &[]),
                message(1, 1, 1, &[]),
                message(1, 7, 1, b"agent"),
                message(1, 6, 0, &[]),
                message(2, 1, 1, &[]),
                message(2, 4, 1, &[]),
                message(2, 6, 1, &[]),
                message(2, 5, 1, &[80, 0, 24, 0]),
            ];
            // What was told when the process died may be told twice.
            while !expected.is_empty() {
                let told = control.next(&driver);
                expected.retain(|message| *message != told);
            }
        });
    }
    assert!(died > 20, "{died}");
}

#[test]
fn a_channel_is_closed_whose_connection_has_died_with_its_process() {
    let make = |records: &DeviceRecords<'_>| attached(inherited(&NAMES, records), vec![]);
    let before = steps_before(&(Arc::new(make) as Arc<MakeDevice>));
    for death in (500..3000).step_by(250) {
        // The first process has a client, and the second none.
        let line = Mutex::new(Some(stream()));
        let kept = Arc::new(Mutex::new(None));
        let make = move |records: &DeviceRecords<'_>| {
            let lines = line.lock().unwrap().take().map(|(client, line)| {
                *kept.lock().unwrap() = Some(client);
                (1, line)
            });
            attached(inherited(&NAMES, records), lines.into_iter().collect())
        };
        let make: Arc<MakeDevice> = Arc::new(make);
        drive_over_deaths(&[before + death], 0, &make, |guest| {
            let driver = driver(guest, 0);
            let [tells, hears] = start(&driver, [TELLS, HEARS]);
            let mut control = Control::new(&driver, tells, hears);
            control.say(&driver, 1, 3, 1);
            // Until the first process has died, and some more.
            let (size, closed) = (message(0, 5, 1, &[80, 0, 24, 0]), message(1, 6, 0, &[]));
            let is_closed = (0..300).any(|_| {
                control.say(&driver, 0, 3, 1);
                let told: Vec<_> = std::iter::from_fn(|| Some(control.next(&driver)))
                    .take_while(|told| *told != size)
                    .collect();
                told.contains(&closed)
            });
            assert!(
                is_closed || control.next(&driver) == closed,
                "it is open still"
            );
        });
    }
}

#[test]
fn a_driver_that_begins_anew_is_told_anew() {
    let bench = Bench::new(&NAMES, vec![]);
    let driver = &bench.driver;
    for _ in 0..3 {
        let [tells, hears] = bench.start([TELLS, HEARS]);
        let mut control = Control::new(driver, tells, hears);
        open_ports(driver, &mut control);
        // It goes with more to be told.
        control.say(driver, 0, 0, 1);
    }
    bench.end();
}

#[test]
fn a_console_with_nothing_to_do_lets_its_worker_sleep() {
    let (mut client, line) = stream();
    let (mut idle, idle_line) = stream();
    let (mut machine, guest) = by_hand(&NAMES, vec![(0, line), (0, idle_line)]);
    // A channel that nobody is at is written to, and so is a console that one reads who is slow; what they say nobody reads.
    let queues = drive(&mut machine, &guest, move |driver| {
        let [tells, hears, mut writes, mut channel] =
            start(driver, [TELLS, HEARS, WRITES, CHANNEL_WRITES]);
        let mut control = Control::new(driver, tells, hears);
        open_ports(driver, &mut control);
        let waits = offer(driver, &mut channel, CHANNEL_WRITES, b"for nobody", &[10]);
        write(driver, &mut writes, WRITES, &numbered(KEPT), &[KEPT]);
        (control, writes, channel, waits)
    });
    client.write_all(b"for nobody either").unwrap();
    come_to_rest(&mut machine);
    sleeps(&mut machine);
    assert_eq!(queues.2.used_index(), 0);
    // Who was slow has the rest, and has woken the worker for it.
    let mut read = 0;
    while read < KEPT {
        read += idle.read(&mut [0; 1 << 16]).unwrap();
        come_to_rest(&mut machine);
    }
    sleeps(&mut machine);
}
