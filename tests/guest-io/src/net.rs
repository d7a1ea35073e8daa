//! Frames of a network device by hand (virtio 1.3, 5.1.6): each is a header of [`HEADER`] bytes and an Ethernet frame.

use crate::{Buffer, Driver, NEXT, Negotiated, Random, RawQueue, WRITE};
pub use xen_virtio_backend::tap::HEADER;

/// Entries of each queue.
pub const SIZE: u16 = 16;
/// The queues of the first pair.
pub const RECEIVE: u32 = 0;
pub const SEND: u32 = 1;

/// A frame of `len` bytes for `to`, behind a header of zeros. Each byte of its contents is `mark`.
pub fn frame(to: [u8; 6], len: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![mark; HEADER + len];
    frame[..HEADER].fill(0);
    frame[HEADER..HEADER + 6].copy_from_slice(&to);
    frame
}

/// Ways to cut `total` bytes: every two pieces, and 100 times up to eight at random, of which some are empty.
pub fn cuts(total: usize) -> impl Iterator<Item = Vec<usize>> {
    let in_two = (1..total).map(move |first| vec![first, total - first]);
    let mut random = Random(7);
    let in_more = (0..100).map(move |_| {
        let mut cuts: Vec<_> = (0..random.below(8)).map(|_| random.below(total)).collect();
        cuts.extend([0, total]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    });
    in_two.chain(in_more)
}

/// Starts the device for a driver that has accepted all but `without`, with these queues.
///
/// # Panics
///
/// If the device refuses the features.
pub fn start<const N: usize>(driver: &Driver, without: u64, queues: [u32; N]) -> [RawQueue; N] {
    let features = driver.offered_features() & !without;
    assert_eq!(driver.negotiate(features), Negotiated::Accepted);
    let queues = queues.map(|index| {
        let queue = RawQueue::new(driver, SIZE);
        driver.start_queue(index, SIZE.into(), queue.addresses());
        queue
    });
    driver.driver_ok();
    // What was at the interface before is thrown away.
    driver.settle();
    queues
}

/// Offers buffers of these lengths, each a chain of its own, from descriptor `first` on.
///
/// # Panics
///
/// If a length is none of a descriptor's.
pub fn post(
    driver: &Driver,
    queue: &mut RawQueue,
    index: u32,
    first: u16,
    lens: &[usize],
) -> Vec<Buffer> {
    let buffers: Vec<_> = lens.iter().map(|len| driver.buffer(*len, true)).collect();
    let heads: Vec<u16> = (first..).take(lens.len()).collect();
    for (buffer, head) in buffers.iter().zip(&heads) {
        let len = u32::try_from(buffer.len).expect("a descriptor's length");
        queue.set_descriptor(*head, buffer.address(), len, WRITE, 0);
    }
    queue.offer_together(&heads);
    driver.notify(index);
    buffers
}

/// Offers one buffer, which is descriptors of these lengths, from the first on.
///
/// # Panics
///
/// If a length is none of a descriptor's.
pub fn post_in_pieces(
    driver: &Driver,
    queue: &mut RawQueue,
    index: u32,
    pieces: &[usize],
) -> Vec<Buffer> {
    let last = pieces.len() - 1;
    let buffers: Vec<_> = pieces
        .iter()
        .map(|len| driver.buffer((*len).max(1), true))
        .collect();
    for (at, (buffer, len)) in buffers.iter().zip(pieces).enumerate() {
        let next = if at < last { NEXT } else { 0 };
        let len = u32::try_from(*len).expect("a descriptor's length");
        let at = u16::try_from(at).expect("an index of the queue");
        queue.set_descriptor(at, buffer.address(), len, WRITE | next, at + 1);
    }
    queue.offer(0);
    driver.notify(index);
    buffers
}

/// What lies in buffers that were [posted in such pieces](post_in_pieces).
pub fn joined(buffers: &[Buffer], pieces: &[usize]) -> Vec<u8> {
    let parts = buffers.iter().zip(pieces);
    parts
        .flat_map(|(buffer, len)| buffer.read()[..*len].to_vec())
        .collect()
}

/// Sends `bytes` in pieces of these lengths, and waits until they are given back.
///
/// # Panics
///
/// If they are not, or are given back with bytes written; if the pieces are not the whole.
pub fn send(driver: &Driver, queue: &mut RawQueue, bytes: &[u8], pieces: &[usize]) {
    let mut at = 0;
    let before = queue.used_index();
    let mut buffers = Vec::new();
    for (index, len) in (0..).zip(pieces) {
        let buffer = driver.buffer((*len).max(1), false);
        buffer.write(0, &bytes[at..at + len]);
        let flags = if at + len < bytes.len() { NEXT } else { 0 };
        let len = u32::try_from(*len).expect("a descriptor's length");
        queue.set_descriptor(index, buffer.address(), len, flags, index + 1);
        buffers.push(buffer);
        at += usize::try_from(len).expect("a length");
    }
    assert_eq!(at, bytes.len());
    queue.offer(0);
    driver.notify(SEND);
    assert!(
        driver.wait(|| queue.used_index() != before),
        "it never came back"
    );
    assert_eq!(queue.used(before), (0, 0));
}

/// A command to the control queue, whose number is `index`: its answer, and what is behind the byte that answers it.
///
/// # Panics
///
/// If no answer comes.
pub fn command(driver: &Driver, queue: &mut RawQueue, index: u32, bytes: &[u8]) -> (u8, Vec<u8>) {
    let sent = driver.buffer(bytes.len(), false);
    sent.write(0, bytes);
    let answer = driver.buffer(9, true);
    answer.write(0, &[0xee]);
    let before = queue.used_index();
    let len = u32::try_from(bytes.len()).expect("a descriptor's length");
    queue.set_descriptor(0, sent.address(), len, NEXT, 1);
    queue.set_descriptor(1, answer.address(), 9, WRITE, 0);
    queue.offer(0);
    driver.notify(index);
    assert!(driver.wait(|| queue.used_index() != before), "no answer");
    let answer = answer.read();
    (answer[0], answer[1..].to_vec())
}
