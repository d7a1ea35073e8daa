//! A device to be, whose back-end is asked what it has.

use super::class::Class;
use super::conversation::{Conversation, Heard, Offer};
use super::events::Events;
use super::frontend::Brought;
use super::session::{Session, SessionError};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// A back-end from its first message until it is known what it has.
pub struct Arrival {
    pub(super) session: Session,
    pub(super) events: Events,
    pub(super) memory: OwnedFd,
    offer: Option<Offer>,
}

impl Arrival {
    /// Begins with the back-end of a device of `class`.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub fn new(brought: Brought, class: &'static Class) -> Result<Self, SessionError> {
        let Brought { socket, memory } = brought;
        let session = Session::begin(socket, class)?;
        let mut events = Events::new()?;
        events.watch(&session)?;
        Ok(Self {
            session,
            events,
            memory,
            offer: None,
        })
    }

    /// What the back-end has, once it has said all of it.
    ///
    /// # Errors
    ///
    /// [`SessionError`]: it is of no use.
    pub fn step(&mut self) -> Result<Option<&Offer>, SessionError> {
        self.events.take()?;
        if self.offer.is_none()
            && let Some(Heard::Offer(offer)) = self.session.hear()?
        {
            self.events.watch(&self.session)?;
            self.offer = Some(offer);
        }
        Ok(self.offer.as_ref())
    }

    /// When [`Arrival::step`] is to be called though nothing is readable.
    pub fn due(&self) -> Option<Instant> {
        self.session.due()
    }
}

impl AsFd for Arrival {
    /// Readable when [`Arrival::step`] is to be called.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
