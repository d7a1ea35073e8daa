//! Everything that decides how long a request waits, and for how many others. The page on performance has the same table.

use std::time::Duration;

macro_rules! tuning {
    ($($(#[$about:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$about])* pub const $name: $type = $value;)*

        /// Names and values.
        #[cfg(test)]
        fn all() -> Vec<(&'static str, String)> {
            vec![$((stringify!($name), format!("{:?}", $name))),*]
        }
    };
}

tuning! {
    /// Traps that are answered before the devices take a step: a guest that does nothing but trap must not starve its own
    /// queues.
    TRAPS_PER_STEP: usize = 64;
    /// The longest wait for an access of an interrupt handler: what a guest that does not come costs in vain.
    HANDLER_LIMIT: Duration = Duration::from_micros(200);
    /// Of a guest whose handlers have not come in that time again and again one of so many accesses is waited for.
    ACCESSES_PER_WAIT: u32 = 64;
    /// Looks for a trap of a handler between looks at the clock.
    HANDLER_LOOKS: u32 = 64;
    /// Looks for a trap between steps that find nothing: traps hold the guest up, and rings do not.
    IDLE_LOOKS: u32 = 32;

    /// Requests that are taken at once: enough to share the cost of a call, and no more, so that a guest with a deep queue
    /// prepares the next ones, and handles the last, while these are under way.
    BATCH: usize = 32;
    /// The fewest that are taken at once of a driver that has more: they share a call's cost.
    SMALLEST_BATCH: usize = 8;
    /// The mean bytes of a request up to which requests wait for others: calls and interrupts cost little beside more data.
    SMALL_REQUEST: u64 = 16 << 10;
    /// Steps without another request after which no more is expected for now: some tens of microseconds.
    PATIENCE: u32 = 512;
    /// Deliveries for which it is remembered how many requests a driver had.
    MEMORY: u32 = 256;
    /// Steps for which results wait for more to be delivered with: some microseconds, whatever the disk does with the
    /// others.
    HELD_STEPS: u32 = 64;
    /// Requests that a device which ends them at once carries out in a step: the guest's other devices wait meanwhile.
    SIMPLE_BATCH: usize = 16;

    /// Requests of a disk that are under way at once, of all its queues; the others wait in theirs.
    MAX_REQUESTS: u16 = 128;
    /// Bytes of memory for data: all that a guest's requests can make us hold, a disk.
    DISK_DATA: usize = 1 << 20;
    /// Bytes of data that are under way at once for one request. A larger one takes several chunks, so that it leaves room
    /// for others.
    CHUNK: usize = 256 << 10;
    /// Copies after which a batch takes no further request, in or out: those of one may be as many as its queue has
    /// descriptors, each in a page of its own, and the guest's other devices wait meanwhile.
    MAX_COPIES: usize = 256;

    /// Frames of a network device's queue that are copied at once.
    FRAMES: usize = 64;
    /// Bytes of memory for the frames of one queue: three of the largest.
    FRAME_DATA: usize = 256 << 10;
    /// Frames after which a driver is told that they were sent, if nothing else interrupts it before.
    SENT_FRAMES: u32 = 32;
    /// The bytes of one that counts as a frame there.
    SENT_BYTES: usize = 2048;
    /// The longest time, in microseconds, for which it is not told.
    SENT_DELAY_US: u32 = 500;
    /// Steps that find no frame at an interface between two looks there, each a system call.
    STEPS_PER_FRAME_LOOK: u32 = 16;

    /// Bytes of a console's output that are taken at once of a request.
    CONSOLE_PIECE: usize = 64 << 10;
    /// Requests of a console's port that are taken at once: Linux writes sixteen bytes by each.
    CONSOLE_REQUESTS: usize = 64;
    /// Bytes of output that wait for more, while the guest writes, before whoever reads it has them.
    CONSOLE_WRITE: usize = 4 << 10;
    /// Steps of a busy console or socket device between two looks at who has written to it, each a system call.
    STEPS_PER_CLIENT_LOOK: u32 = 16;

    /// Bytes that a guest may have sent by a connection of a socket device and that nobody has taken yet.
    VSOCK_BUFFER: u32 = 128 << 10;
    /// Packets of a socket device that are copied at once.
    PACKETS: usize = 32;
    /// Bytes of memory for the packets of one direction.
    PACKET_DATA: usize = 256 << 10;

    /// Steps without a look at what else is readable.
    BUSY_STEPS: u32 = 256;
    /// The longest time without one, but for that of a few steps. So many steps take less, as a rule.
    BUSY_LIMIT: Duration = Duration::from_millis(10);
    /// Steps without a look at the time, and at the guest's share of the processor: what it can have in advance.
    STEPS_PER_CHECK: u32 = 8;
    /// Steps that find nothing without a look at the clock, and at who else wants the processor.
    STEPS_PER_LOOK: u32 = 32;
    /// The shortest time for which a worker looks for work before it sleeps, if it looks at all.
    SHORTEST_POLL: Duration = Duration::from_micros(20);
    /// The time from which on a yield of the processor is long.
    LONG_YIELD: Duration = Duration::from_millis(2);
    /// A time of which half is long yields says that others want the processor.
    CONTENTION_WINDOW: Duration = Duration::from_millis(40);
    /// For how long a worker then looks for work, and sleeps in place of looking, to see what is better.
    CONTENTION_TRIAL: Duration = Duration::from_millis(80);
    /// For how long it keeps to that.
    CONTENTION_KEPT: Duration = Duration::from_millis(1280);
    /// How much more requests looking must bring than sleeping.
    WORTH_LOOKING: f64 = 1.125;
    /// The longest rest of a guest that has had its share without a look at what else is readable.
    LONGEST_THROTTLE: Duration = Duration::from_millis(50);
    /// The shortest sleep when something is to be tried again: what cannot be tried now costs next to nothing.
    SHORTEST_SLEEP: Duration = Duration::from_millis(1);
    /// The wait before the second try of what dom0 lacked something for; each further one is twice as long.
    FIRST_WAIT: Duration = Duration::from_millis(5);
    /// The longest of these waits.
    LONGEST_WAIT: Duration = Duration::from_millis(500);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_on_performance_has_the_same_table() {
        let page = include_str!("../../docs/performance.md");
        for (name, value) in all() {
            let row = format!("| `{name}` | {value} |");
            assert!(page.contains(&row), "{row}");
        }
        assert_eq!(page.matches("\n| `").count(), all().len());
    }
}
