//! What a socket device counts.

#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Packets that either side has sent, and those of the guest's that were none.
    pub(super) packets: u64,
    pub(super) malformed: u64,
    /// Bytes that the guest has sent to programs of the host's, and that it was sent.
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// Connections that have begun.
    pub(super) connections: u64,
    /// Connections that the host's programs have refused, or for which there was no room.
    pub(super) refused: u64,
    /// Connections that were ended since one side did what it may not, or was gone.
    pub(super) resets: u64,
}

impl Counters {
    pub(super) fn list(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("sent_bytes", self.sent_bytes);
        add("received_bytes", self.received_bytes);
        add("connections", self.connections);
        add("refused", self.refused);
        add("resets", self.resets);
        add("malformed", self.malformed);
    }
}
