//! What a network device counts.

use std::io;

/// Since the device was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    received: u64,
    received_bytes: u64,
    sent: u64,
    sent_bytes: u64,
    /// Frames for which the driver's buffers are too small.
    pub(super) too_large: u64,
    /// Frames that the driver did not want.
    pub(super) unwanted: u64,
    /// Frames that the driver could not have taken.
    pub(super) unfit: u64,
    /// Frames whose buffers could not be written.
    unwritten: u64,
    /// Frames of the driver's that are none, that ask for what it has not accepted, or that could not be read.
    pub(super) malformed: u64,
    /// Frames that the interface did not take.
    pub(super) unsent: u64,
    pub(super) commands: u64,
    pub(super) refused_commands: u64,
    /// Why the interface cannot be used, if so.
    pub(super) interface: Option<String>,
}

impl Counters {
    /// A frame of `bytes` was given to the driver, whole or not.
    pub(super) fn received(&mut self, is_whole: bool, bytes: usize) {
        match is_whole {
            true => {
                self.received += 1;
                self.received_bytes += bytes as u64;
            }
            false => self.unwritten += 1,
        }
    }

    /// A frame of `bytes` was given to the interface.
    pub(super) fn sent(&mut self, result: io::Result<()>, bytes: usize) {
        match result {
            Ok(()) => {
                self.sent += 1;
                self.sent_bytes += bytes as u64;
                self.interface = None;
            }
            Err(error) => {
                self.unsent += 1;
                // What the kernel finds wrong with a frame is the driver's doing; what it has no room for, nobody's.
                let is_usual = matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput
                        | io::ErrorKind::WouldBlock
                        | io::ErrorKind::OutOfMemory
                ) || error.raw_os_error() == Some(libc::ENOBUFS);
                if !is_usual {
                    self.interface = Some(error.to_string());
                }
            }
        }
    }

    /// Frames and commands, and those that the driver got wrong.
    pub(super) fn requests(&self) -> (u64, u64) {
        let failed = self.unwritten + self.malformed + self.refused_commands;
        let frames = self.received + self.unwritten + self.sent + self.unsent + self.malformed;
        (frames + self.commands, failed)
    }

    pub(super) fn list(&self, add: &mut dyn FnMut(&'static str, u64)) {
        add("received_frames", self.received);
        add("received_bytes", self.received_bytes);
        add("sent_frames", self.sent);
        add("sent_bytes", self.sent_bytes);
        add("dropped_too_large", self.too_large);
        add("dropped_unwanted", self.unwanted);
        add("dropped_unfit", self.unfit);
        add("dropped_unwritten", self.unwritten);
        add("dropped_malformed", self.malformed);
        add("dropped_unsent", self.unsent);
        add("control_commands", self.commands);
        add("control_refused", self.refused_commands);
    }
}
