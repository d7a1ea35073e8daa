//! What a console counts.

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: u64,
    pub(super) output_bytes: u64,
    pub(super) input_bytes: u64,
    /// Requests and messages that are none.
    pub(super) malformed: u64,
    /// Bytes that were too old to be kept when they could be written.
    unread_bytes: u64,
    unlogged_bytes: u64,
    /// Clients for which there was no room.
    pub(super) turned_away: u64,
}

impl Counters {
    /// Somebody, or the log, has missed so many bytes.
    pub(super) fn missed(&mut self, is_log: bool, bytes: u64) {
        match is_log {
            true => self.unlogged_bytes += bytes,
            false => self.unread_bytes += bytes,
        }
    }

    pub(super) fn list(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("output_bytes", self.output_bytes);
        add("input_bytes", self.input_bytes);
        add("unread_bytes", self.unread_bytes);
        add("unlogged_bytes", self.unlogged_bytes);
        add("malformed", self.malformed);
        add("turned_away", self.turned_away);
    }
}
