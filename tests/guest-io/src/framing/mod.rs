//! How a network device lays frames in the driver's buffers and takes them out: a driver by hand at one end of the cable, and a
//! [peer] at the other.

pub mod peer;

use crate::net::{
    HEADER, RECEIVE, SEND, SIZE, command, cuts, joined, post, post_in_pieces, send, start,
};
use crate::{Buffer, Driver, RawQueue};
use anyhow::{Context, Result, ensure};
use peer::{NEEDS_CSUM, Order, SMALLEST, SUM_OFFSET, SUM_START, echoed, number_and_mark};
use std::thread::sleep;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as ids;
use xen_virtio_transport::{Register, Width};

/// Where the configuration has the address, and the number of pairs (virtio 1.3, 5.1.4).
const ADDRESS: u64 = 0x100;
const PAIRS: u64 = 0x108;
const MERGED: u64 = 1 << ids::VIRTIO_NET_F_MRG_RXBUF;
/// Without it, a driver has no other offload of what it receives.
const GUEST_CSUM: u64 = 1 << ids::VIRTIO_NET_F_GUEST_CSUM;
/// More frames than anybody waits for.
const FLOOD: u32 = u32::MAX;
/// After so long without a frame, a flood has ended.
const QUIET: Duration = Duration::from_millis(300);
/// Bytes of a frame whose length does not matter.
const SMALL: u16 = 60;

/// A thing that is checked, and what came of it.
type Check = fn(&Driver) -> Result<String>;

const CHECKS: &[(&str, Check)] = &[
    ("pieces", any_pieces),
    ("too large", frames_too_large),
    ("partial checksums", partial_checksums),
    ("pairs", numbers_of_pairs),
    ("reset in a flood", resets_in_a_flood),
    ("refilled in a flood", refills_in_a_flood),
];

/// Checks everything with the device's [peer], which ends then. A line for each.
///
/// # Errors
///
/// The first check that fails.
pub fn check_all(driver: &Driver) -> Result<Vec<String>> {
    let lines = CHECKS.iter().map(|(name, check)| {
        let said = check(driver).with_context(|| (*name).to_owned())?;
        Ok(format!("{name}: {said}"))
    });
    let lines = lines.collect::<Result<_>>()?;
    Session::new(driver, 0).ask(Order::End);
    Ok(lines)
}

/// A driver with one pair of queues, from its start to its reset.
struct Session<'a> {
    driver: &'a Driver,
    mac: [u8; 6],
    receiving: RawQueue,
    sending: RawQueue,
}

impl<'a> Session<'a> {
    /// Of a driver that accepts all but `without`.
    fn new(driver: &'a Driver, without: u64) -> Self {
        let [receiving, sending] = start(driver, without, [RECEIVE, SEND]);
        Self {
            driver,
            mac: mac(driver),
            receiving,
            sending,
        }
    }

    fn ask(&mut self, order: Order) {
        let asked = order.frame(self.mac, SMALLEST, 0);
        send(self.driver, &mut self.sending, &asked, &[asked.len()]);
    }

    fn post(&mut self, lens: &[usize]) -> Vec<Buffer> {
        post(self.driver, &mut self.receiving, RECEIVE, 0, lens)
    }

    /// Waits until so many buffers have been used, or more.
    fn wait_for(&self, used: u16) -> Result<()> {
        let came = self.driver.wait(|| self.receiving.used_index() >= used);
        let now = self.receiving.used_index();
        ensure!(came, "{now} buffers are used, and not {used}");
        Ok(())
    }

    /// Ends a flood, whatever of it is still on its way.
    fn end_flood(&mut self) -> Result<()> {
        const MARK: u8 = 0xee;
        let send = |count| Order::Send {
            count,
            len: SMALL,
            mark: MARK,
        };
        self.ask(send(0));
        // An interface that is full of it would drop the frame that is asked for then.
        let last = loop {
            let used = self.receiving.used_index();
            let buffers = self.post(&[256]);
            let end = Instant::now() + QUIET;
            while self.receiving.used_index() == used && Instant::now() < end {
                std::thread::yield_now();
            }
            if self.receiving.used_index() == used {
                break buffers;
            }
        };
        let used = self.receiving.used_index();
        self.ask(send(1));
        self.wait_for(used + 1)?;
        let came = number_and_mark(&last[0].read());
        ensure!(came == Some((0, MARK)), "{came:?} came after the flood");
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.driver.write(Register::Status, 0);
    }
}

fn mac(driver: &Driver) -> [u8; 6] {
    [0, 1, 2, 3, 4, 5].map(|byte| {
        let value = driver.raw_read(ADDRESS + byte, Width::One);
        value.to_le_bytes()[0]
    })
}

/// A frame and its header may be cut anywhere, both ways, whether buffers are merged or not.
fn any_pieces(driver: &Driver) -> Result<String> {
    const LEN: usize = 100;
    let mut count = 0;
    for without in [0, MERGED] {
        let mut session = Session::new(driver, without);
        for (pieces, mark) in cuts(HEADER + LEN).zip((0..=u8::MAX).cycle()) {
            let asked = Order::Echo.frame(session.mac, LEN, mark);
            let used = session.receiving.used_index();
            let buffers = post_in_pieces(driver, &mut session.receiving, RECEIVE, &pieces);
            send(driver, &mut session.sending, &asked, &pieces);
            let came = session.wait_for(used + 1);
            came.with_context(|| format!("in pieces of {pieces:?}"))?;
            let mut expected = echoed(&asked);
            // 5.1.6.4.1: one buffer, however many descriptors it has.
            expected[10] = 1;
            ensure!(
                joined(&buffers, &pieces) == expected,
                "in pieces of {pieces:?} it comes back otherwise"
            );
            count += 1;
        }
    }
    Ok(format!("{count} frames went both ways"))
}

/// A frame for which a buffer is too small is dropped whole.
fn frames_too_large(driver: &Driver) -> Result<String> {
    let mut session = Session::new(driver, MERGED);
    let buffers = session.post(&[HEADER + 100; 2]);
    for (len, mark) in [(101, 1), (1500, 2), (100, 3)] {
        let count = 1;
        session.ask(Order::Send { count, len, mark });
    }
    session.wait_for(1)?;
    driver.settle();
    let (used, first) = (session.receiving.used_index(), session.receiving.used(0));
    ensure!((used, first) == (1, (0, 112)), "{used} used, {first:?}");
    let mark = number_and_mark(&buffers[0].read());
    ensure!(mark == Some((0, 3)), "the frame that came is {mark:?}");
    ensure!(
        buffers[1].read().iter().all(|byte| *byte == 0),
        "a buffer has part of a frame"
    );
    Ok("2 of 3 frames dropped".into())
}

/// The header and the frame of one that the peer leaves to be completed, if it is not dropped.
fn partial(session: &mut Session<'_>) -> Result<Option<Vec<u8>>> {
    const MARK: u8 = 0xa5;
    let used = session.receiving.used_index();
    let buffers = session.post(&[2000, 2000]);
    session.ask(Order::Partial { len: 200 });
    session.ask(Order::Send {
        count: 1,
        len: SMALL,
        mark: MARK,
    });
    session.wait_for(used + 1)?;
    let first = buffers[0].read();
    if number_and_mark(&first) == Some((0, MARK)) {
        // The other buffer is still the device's.
        session.ask(Order::Echo);
        session.wait_for(used + 2)?;
        return Ok(None);
    }
    session.wait_for(used + 2)?;
    Ok(Some(first))
}

/// A driver without `GUEST_CSUM` sees no frame without its checksum; one with it does.
fn partial_checksums(driver: &Driver) -> Result<String> {
    const TRIES: usize = 10;
    let mut completed = 0;
    let mut session = Session::new(driver, GUEST_CSUM);
    for _ in 0..TRIES {
        if let Some(frame) = partial(&mut session)? {
            ensure!(
                frame[0] & NEEDS_CSUM == 0,
                "its header is {:?}",
                &frame[..HEADER]
            );
            let from = HEADER + usize::from(SUM_START);
            let sum = sum(&frame[from..HEADER + 200]);
            ensure!(sum == u16::MAX, "its sum is {sum:#x}");
            completed += 1;
        }
        // The interface follows what drivers accept 20 times a second.
        sleep(Duration::from_millis(50));
    }
    drop(session);
    let mut session = Session::new(driver, 0);
    for _ in 0..TRIES {
        if let Some(frame) = partial(&mut session)? {
            let place = [SUM_START.to_le_bytes(), SUM_OFFSET.to_le_bytes()].concat();
            if frame[0] & NEEDS_CSUM != 0 {
                ensure!(
                    frame[6..10] == place,
                    "its header is {:?}",
                    &frame[..HEADER]
                );
                return Ok(format!(
                    "{completed} of {TRIES} came completed; one was left to a driver that takes them"
                ));
            }
        }
        sleep(Duration::from_millis(50));
    }
    anyhow::bail!("none is left to the driver that takes them")
}

/// The sum of the Internet's checksums (RFC 1071): of a frame with its own in it, all ones.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u16::from_be_bytes([high, low]),
        [high] => u16::from_be_bytes([high, 0]),
        _ => 0,
    });
    words.fold(0, |sum: u16, word| {
        let (sum, carried) = sum.overflowing_add(word);
        sum + u16::from(carried)
    })
}

/// Numbers of pairs that cannot be are refused, and the same one twice is taken.
fn numbers_of_pairs(driver: &Driver) -> Result<String> {
    const FRAMES: u16 = 4;
    // The driver's configuration is there before it has accepted anything.
    let pairs = driver.raw_read(PAIRS, Width::Two);
    let pairs = u16::try_from(pairs).context("a number of pairs")?;
    ensure!(pairs == 2, "the device has {pairs} pairs, and not 2");
    let (second, control) = (2, 4);
    let mac = mac(driver);
    let [mut first, mut sending, mut other, mut commands] =
        start(driver, 0, [RECEIVE, SEND, second, control]);
    let _buffers = [
        post(driver, &mut first, RECEIVE, 0, &[256; 16]),
        post(driver, &mut other, second, 0, &[256; 16]),
    ];
    let mut set = |pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        command(driver, &mut commands, control, &[4, 0, low, high]).0
    };
    for (pairs, answer) in [(0, 1), (3, 1), (u16::MAX, 1), (2, 0), (2, 0)] {
        let said = set(pairs);
        ensure!(said == answer, "{pairs} pairs are answered by {said}");
    }
    let mut ask = || {
        for _ in 0..FRAMES {
            let asked = Order::Echo.frame(mac, SMALLEST, 0);
            send(driver, &mut sending, &asked, &[asked.len()]);
        }
    };
    ask();
    let both = || first.used_index() + other.used_index();
    ensure!(driver.wait(|| both() == FRAMES), "{} frames came", both());
    ensure!(set(1) == 0, "one pair is refused");
    driver.settle();
    let before = first.used_index();
    ask();
    ensure!(
        driver.wait(|| first.used_index() == before + FRAMES),
        "with one pair, {} frames came",
        first.used_index() - before
    );
    driver.write(Register::Status, 0);
    Ok("0, 3 and 65,535 refused, 2 taken twice, frames come by 2 and by 1".into())
}

/// What comes after a reset is not delivered into the buffers of before.
fn resets_in_a_flood(driver: &Driver) -> Result<String> {
    const ROUNDS: usize = 30;
    let mut delivered = 0;
    for round in 0..ROUNDS {
        let mut session = Session::new(driver, 0);
        session.ask(Order::Send {
            count: FLOOD,
            len: SMALL,
            mark: 7,
        });
        let lens = vec![2000; 1 + round % usize::from(SIZE / 2)];
        let buffers = session.post(&lens);
        for _ in 0..round % 5 * 20 {
            driver.read(Register::Status);
        }
        driver.write(Register::Status, 0);
        ensure!(driver.read(Register::Status) == 0, "the reset is not done");
        let contents = || buffers.iter().map(Buffer::read).collect::<Vec<_>>();
        let before = (session.receiving.used_index(), contents());
        driver.settle();
        let after = (session.receiving.used_index(), contents());
        ensure!(
            before == after,
            "round {round}: frames came after the reset"
        );
        delivered += before.0;
    }
    let mut session = Session::new(driver, 0);
    session.end_flood()?;
    ensure!(delivered > 0, "there was no flood");
    Ok(format!("{ROUNDS} resets, {delivered} frames before them"))
}

/// A queue that is empty and refilled, and a driver that sleeps meanwhile, get on.
fn refills_in_a_flood(driver: &Driver) -> Result<String> {
    const FRAMES: u16 = 300;
    let mut session = Session::new(driver, 0);
    session.ask(Order::Send {
        count: FLOOD,
        len: SMALL,
        mark: 7,
    });
    let mut next = 0;
    let mut last = None;
    while next < FRAMES {
        let count = (next % 7 + 1).min(FRAMES - next);
        // Asleep, now and then, before there are any.
        if next % 50 == 0 {
            sleep(Duration::from_millis(5));
        }
        let buffers = session.post(&vec![256; count.into()]);
        next += count;
        session.wait_for(next)?;
        for buffer in buffers {
            let number = number_and_mark(&buffer.read()).context("another frame")?.0;
            ensure!(last < Some(number), "frame {number} came after {last:?}");
            last = Some(number);
        }
    }
    session.end_flood()?;
    Ok(format!(
        "{FRAMES} frames, the last of them number {}",
        last.unwrap_or(0)
    ))
}
