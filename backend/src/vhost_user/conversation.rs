//! What a device says with whoever serves its queues.

use super::doorbell::Doorbell;
use super::session::SessionError;
use crate::shadow::{Region, RingPlaces};
use crate::vhost_kernel::Kernel;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// What a back-end has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// All of its feature bits.
    pub features: u64,
    pub queues: u16,
    /// Its configuration space, if it has one.
    pub config: Vec<u8>,
}

/// What has come of what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// The back-end can be used.
    Offer(Offer),
    /// All that an earlier process had asked is answered: what that had it serve it is to let go of.
    TakenOver,
    /// It serves all queues that it was told to.
    Serving,
    /// It has let go of a queue, and would have gone on with element `next` of its available ring.
    LetGo { queue: usize, next: u16 },
    /// Its configuration space has changed to this.
    Config(Vec<u8>),
}

/// What the driver has accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// All of it.
    pub(crate) accepted: u64,
    /// What of it the back-end is told.
    pub(crate) of_back_end: u64,
}

/// What is left of a conversation.
pub(crate) enum Ended {
    Closed,
    /// The kernel, which can be begun with again.
    Again(Kernel),
}

/// What is said with one back-end, from the first message to the last. Nothing here waits for it: what was asked is
/// [heard](Conversation::hear) later.
pub(crate) trait Conversation {
    /// Whether queues may be started.
    fn is_usable(&self) -> bool;

    fn offer(&self) -> &Offer;

    /// By when something is to be heard.
    fn due(&self) -> Option<Instant>;

    /// Whether [`Conversation::hear`] is to be called again though nothing tells of it.
    fn has_more(&self) -> bool;

    /// Hands to `add` what is readable when the back-end says something.
    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>));

    /// What tells its connection from others that there are, if it has one.
    fn connection(&self) -> Option<u64>;

    /// Ends the conversation, after which the back-end's share of the device is another one's.
    fn end(self: Box<Self>) -> Ended;

    /// What is next of what the back-end has said, if it has said something.
    ///
    /// # Errors
    ///
    /// [`SessionError`]: it is to be given up. So it is with the others.
    fn hear(&mut self) -> Result<Option<Heard>, SessionError>;

    /// Tells the back-end what the driver has accepted, and which memory there is, before queues are started.
    fn prepare(&mut self, driver: Driver, region: &Region, base: u64) -> Result<(), SessionError>;

    /// Tells the back-end to serve queue `index`, from the beginning of its rings at `rings`: it looks at it when the doorbell is
    /// rung, and writes to `call` when it has used something.
    fn start(
        &mut self,
        index: usize,
        rings: &RingPlaces,
        base: u64,
        call: BorrowedFd<'_>,
    ) -> Result<Doorbell, SessionError>;

    /// After the last queue was started: [`Heard::Serving`] follows.
    fn started(&mut self) -> Result<(), SessionError>;

    /// Tells the back-end to let go of queue `index`: [`Heard::LetGo`] follows.
    fn stop(&mut self, index: usize) -> Result<(), SessionError>;

    /// The driver has reset the device, and the back-end has let go of its queues.
    fn reset(&mut self) -> Result<(), SessionError>;

    /// The driver has written `data` at byte `offset` of the configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), SessionError>;
}
