//! What tells of a back-end: one descriptor for all of them, which stays the same over a reconnection.

use super::conversation::Conversation;
use super::session::{SessionError, of_system};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::{Errno, write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Events that are taken at once.
const TOGETHER: usize = 8;

pub(super) struct Events {
    epoll: OwnedFd,
    /// Written by the back-end when it has used something. It is never read: the back-end has it too, and could have us wait
    /// for what it has read first.
    call: OwnedFd,
    /// Written by us, and nobody else's.
    wake: OwnedFd,
}

fn event() -> Result<OwnedFd, SessionError> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    event.map_err(|errno| of_system(errno.into()))
}

impl Events {
    pub(super) fn new() -> Result<Self, SessionError> {
        let (call, wake) = (event()?, event()?);
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| of_system(errno.into()))?;
        let this = Self { epoll, call, wake };
        this.add(this.call.as_fd())?;
        this.add(this.wake.as_fd())?;
        Ok(this)
    }

    fn add(&self, source: BorrowedFd<'_>) -> Result<(), SessionError> {
        // Each write is an event, whether what it wrote was read or not.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        match epoll::add(
            &self.epoll,
            source,
            EventData::new_u64(data_of(source)),
            flags,
        ) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(of_system(errno.into())),
        }
    }

    /// Watches what the session has.
    pub(super) fn watch(&mut self, session: &dyn Conversation) -> Result<(), SessionError> {
        let mut watched = Ok(());
        session.sources(&mut |source| {
            if watched.is_ok() {
                watched = self.add(source);
            }
        });
        watched
    }

    /// Watches a session no more, whose socket others have too.
    pub(super) fn forget(&mut self, session: &dyn Conversation) {
        session.sources(&mut |source| {
            // An error means that it was not watched yet.
            let _ = epoll::delete(&self.epoll, source);
        });
    }

    /// A new descriptor for calls: whoever had the last one does not tell of the next.
    pub(super) fn renew_call(&mut self) -> Result<(), SessionError> {
        let call = event()?;
        // A descriptor that others have too stays in the set until it is taken out.
        let _ = epoll::delete(&self.epoll, &self.call);
        self.call = call;
        self.add(self.call.as_fd())
    }

    /// Has them be readable.
    pub(super) fn wake(&self) {
        // It holds more than anybody writes.
        let _ = write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn call(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Takes what has been told; the next event is one that comes from here on. True if the back-end may have said something.
    pub(super) fn take(&self) -> Result<bool, SessionError> {
        let mut events = [epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; TOGETHER];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ours = [&self.call, &self.wake].map(|event| data_of(event.as_fd()));
        match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok(count) => Ok(events[..count]
                .iter()
                .any(|event| !ours.contains(&event.data.u64()))),
            Err(Errno::INTR) => Ok(true),
            Err(errno) => Err(of_system(errno.into())),
        }
    }
}

/// What the event of a descriptor is known by.
fn data_of(source: BorrowedFd<'_>) -> u64 {
    u64::try_from(source.as_raw_fd()).expect("a descriptor")
}

impl AsFd for Events {
    /// Readable when there is something to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
