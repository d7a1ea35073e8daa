//! How much each side of a connection may send (virtio 1.3, 5.10.6.3). The counts of bytes go round at 2^32.

use super::packet::Credit;
use crate::tuning::VSOCK_BUFFER;

/// What the guest has not been told of yet, and is to be told without another packet.
const UNTOLD: u32 = VSOCK_BUFFER / 4;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flow {
    /// What the guest has said last.
    guest: Credit,
    /// Bytes that it was sent.
    sent: u32,
    /// Bytes that it has sent, and those of them that were passed on.
    received: u32,
    forwarded: u32,
    /// … as it was told last.
    told: u32,
}

/// A guest has sent more than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overrun;

impl Flow {
    /// The guest has said this.
    pub(super) fn heard(&mut self, credit: Credit) {
        self.guest = credit;
    }

    /// Bytes that the guest has room for.
    pub(super) fn room(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest.forwarded);
        self.guest.buffer.saturating_sub(under_way) as usize
    }

    pub(super) fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// The guest has sent `len` bytes.
    ///
    /// # Errors
    ///
    /// [`Overrun`].
    pub(super) fn received(&mut self, len: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > VSOCK_BUFFER - held {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// So many bytes of what the guest has sent were passed on.
    pub(super) fn forwarded(&mut self, len: usize) {
        let len = u32::try_from(len).expect("no more than was received");
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// What the guest has sent has gone, to whomever.
    pub(super) fn forwarded_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Whether the guest is to be told how much it may send.
    pub(super) fn is_to_be_told(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= UNTOLD
    }

    /// What the guest is told with the next packet.
    pub(super) fn tell(&mut self) -> Credit {
        self.told = self.forwarded;
        Credit {
            buffer: VSOCK_BUFFER,
            forwarded: self.forwarded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A flow whose counts go round soon.
    fn late() -> Flow {
        let near = u32::MAX - 1000;
        Flow {
            guest: Credit {
                buffer: 5000,
                forwarded: near,
            },
            sent: near,
            received: near,
            forwarded: near,
            told: near,
        }
    }

    #[test]
    fn the_guest_is_sent_what_it_has_room_for() {
        let mut flow = late();
        assert_eq!(flow.room(), 5000);
        flow.sent(4000);
        assert_eq!(flow.room(), 1000);
        flow.sent(1000);
        assert_eq!(flow.room(), 0);
        let credit = |buffer, passed_on: u32| Credit {
            buffer,
            forwarded: (u32::MAX - 1000).wrapping_add(passed_on),
        };
        flow.heard(credit(5000, 4500));
        assert_eq!(flow.room(), 4500);
        // What it has shrunk to it has not to be sent.
        flow.heard(credit(400, 4500));
        assert_eq!(flow.room(), 0);
        // More passed on than it was sent: it says nothing that could be gone by.
        flow.heard(credit(5000, 5001));
        assert_eq!(flow.room(), 0);
    }

    proptest! {
        /// Whatever a guest sends, and however it is passed on: it may have as much under way as it was told, and not a byte more.
        #[test]
        fn a_guest_may_send_what_it_was_told(
            pieces in prop::collection::vec((0u32..=VSOCK_BUFFER, 0u32..=VSOCK_BUFFER), 1..200)
        ) {
            let mut flow = late();
            let (mut sent, mut held) = (late().received, 0u32);
            for (wanted, passed_on) in pieces {
                let credit = flow.tell();
                let may = credit.buffer - sent.wrapping_sub(credit.forwarded);
                prop_assert_eq!(may, VSOCK_BUFFER - held);
                let mut other = flow;
                prop_assert!(other.received(may + 1).is_err() && other.received(may).is_ok());
                let wanted = wanted.min(may);
                prop_assert!(flow.received(wanted).is_ok());
                sent = sent.wrapping_add(wanted);
                held += wanted;
                let passed_on = passed_on.min(held);
                flow.forwarded(passed_on as usize);
                held -= passed_on;
                prop_assert_eq!(flow.is_to_be_told(), passed_on >= UNTOLD);
            }
        }
    }
}
