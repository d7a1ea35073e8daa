//! What a disk counts.

/// Counts since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) requests: u64,
    /// Requests that ended with an error status.
    pub(super) errors: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    /// Calls that hand transfers to the kernel: of io_uring, or one for each transfer where that is missing.
    pub(super) submissions: u64,
    pub(super) time: StageTimes,
}

/// Nanoseconds that went into each stage of the device's requests, estimated from some of the batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StageTimes {
    /// Batches of requests that were copied in, submitted, and delivered.
    pub(super) batches: u64,
    pub(super) submissions: u64,
    pub(super) deliveries: u64,
    /// Copies from the guest.
    pub(super) copy_in: u64,
    /// Handing transfers to the kernel, and what it does of them meanwhile.
    pub(super) submit: u64,
    /// Copies to the guest.
    pub(super) copy_out: u64,
}

impl Counters {
    /// Those that not every device has, by the names that `xen-virtioctl` knows.
    pub(super) fn list(&self, add: &mut dyn FnMut(&'static str, u64)) {
        for (name, value) in [
            ("read_bytes", self.read_bytes),
            ("written_bytes", self.written_bytes),
            ("submissions", self.submissions),
            ("batches", self.time.batches),
            ("deliveries", self.time.deliveries),
            ("copy_in_ns", self.time.copy_in),
            ("submit_ns", self.time.submit),
            ("copy_out_ns", self.time.copy_out),
        ] {
            add(name, value);
        }
    }
}
