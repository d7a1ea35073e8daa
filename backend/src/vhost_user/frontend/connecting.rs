//! How the device's back-ends come and go.

use super::super::arrival::Arrival;
use super::super::connection::ConnectionError;
use super::super::conversation::{Conversation, Ended};
use super::super::session::{Session, SessionError, of_system};
use super::{Brought, Frontend, Lasting, Link, Setup, Told};
use crate::device::{DeviceError, DeviceFailure};
use crate::error_line::with_sources;
use crate::shadow::Region;
use crate::vhost_kernel::{Kernel, KernelSession};
use rustix::net::{Shutdown, shutdown};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How often the kernel is begun with again for one driver: what it does not get on with is the driver's, as a rule.
const MOST_STUCK: u32 = 3;

/// How long after it was given up the kernel is begun with again.
const AGAIN: Duration = Duration::from_secs(1);

impl Frontend {
    /// Goes on with a back-end that has said what it has.
    ///
    /// # Errors
    ///
    /// [`SessionError`] if the system lacks something.
    pub fn with(mut self, arrival: Arrival) -> Result<Self, SessionError> {
        let sizes = &self.identity.queue_sizes;
        let region = Region::begin(arrival.memory, sizes, self.setup.pool);
        self.relay.lose();
        self.relay.have_next(region.map_err(of_system)?);
        self.events = arrival.events;
        self.session = Some(Box::new(arrival.session));
        self.absence = None;
        self.connections = 1;
        Ok(self)
    }

    /// A device that the kernel serves.
    ///
    /// # Errors
    ///
    /// [`SessionError`] if it does not.
    pub fn of_kernel(setup: Setup, kernel: Kernel) -> Result<Self, SessionError> {
        let session = KernelSession::begin(kernel, setup.class).map_err(|(error, _)| error)?;
        let class = setup.class;
        let lasting = Lasting::nothing(class.queues, class.queue_size).map_err(of_system)?;
        let (pool, link) = (setup.pool, Link::default());
        let mut this = Self::with_pool(setup, pool, session.offer(), link, lasting)?;
        this.go_on_with(Ok(Box::new(session)));
        Ok(this)
    }

    /// Goes on with the back-end of an earlier process, which shared `left` with it. What comes of that is seen later; if it is
    /// nothing, the next back-end is waited for.
    pub fn inherit(&mut self, brought: Brought, left: OwnedFd) {
        let sizes = &self.identity.queue_sizes;
        let region = Region::left(left, sizes, self.setup.pool);
        let socket = self.have_memory(brought);
        let is_ours = region.is_ok_and(|region| self.relay.inherit(region));
        let taken_over = socket.and_then(|socket| {
            if is_ours {
                return Session::take_over(socket, self.setup.class, self.offer.clone());
            }
            // Begins with it as with any other: it has closed this by then.
            let _ = shutdown(&socket, Shutdown::Both);
            Err(ConnectionError::Closed.into())
        });
        self.go_on_with(taken_over.map(|session| Box::new(session) as _));
    }

    /// The back-end is gone; the next one, at the other end of the socket, is to have its memory.
    fn have_memory(&mut self, brought: Brought) -> Result<OwnedFd, SessionError> {
        self.relay.lose();
        let Brought { socket, memory } = brought;
        match Region::begin(memory, &self.identity.queue_sizes, self.setup.pool) {
            Ok(region) => {
                self.relay.have_next(region);
                Ok(socket)
            }
            Err(error) => {
                let _ = shutdown(&socket, Shutdown::Both);
                Err(of_system(error))
            }
        }
    }

    /// Whether it has a connection, whatever comes of that.
    pub fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// Begins with another back-end.
    pub(super) fn begin(&mut self, brought: Brought) {
        self.lose(None);
        let class = self.setup.class;
        let begun = self
            .have_memory(brought)
            .and_then(|socket| Session::begin(socket, class));
        self.go_on_with(begun.map(|session| Box::new(session) as _));
    }

    /// Begins with the kernel again, if it is time for that.
    pub(super) fn begin_again(&mut self) {
        let is_due = |again: &mut (Instant, Kernel)| again.0 <= Instant::now();
        let Some((_, kernel)) = self.again.take_if(is_due) else {
            return;
        };
        match KernelSession::begin(kernel, self.setup.class) {
            Ok(session) => self.go_on_with(Ok(Box::new(session))),
            Err((error, kernel)) => {
                self.lose(Some(&error));
                self.again = Some((Instant::now() + AGAIN, kernel));
            }
        }
    }

    /// Goes on with a session that has begun, in place of none.
    pub(super) fn go_on_with(&mut self, begun: Result<Box<dyn Conversation>, SessionError>) {
        self.connections += 1;
        self.shares = false;
        let watched = begun.and_then(|session| {
            let watched = self.events.watch(&*session);
            // What cannot be watched is ended as what was.
            self.session = Some(session);
            watched
        });
        match watched {
            Ok(()) => self.looks = true,
            Err(error) => self.lose(Some(&error)),
        }
    }

    /// There is no back-end any more. Another one is waited for, and the driver with it.
    pub(super) fn lose(&mut self, why: Option<&SessionError>) {
        if let Some(session) = self.session.take() {
            self.events.forget(&*session);
            match session.end() {
                Ended::Closed => {}
                Ended::Again(kernel) => self.again = Some((Instant::now() + AGAIN, kernel)),
            }
        }
        self.told.fill_with(|| Told::Nothing);
        self.is_serving = false;
        self.relay.lose();
        if let Some(why) = why {
            let why = with_sources(why);
            if self.log_limit.allow() {
                tracing::warn!("the back-end is given up: {why}; the guest waits for another one");
            }
            self.absence = Some(why);
        }
    }

    /// Gives the back-end up.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the driver has had something from it on which it cannot rely.
    pub(super) fn give_up(&mut self, error: SessionError) -> Result<(), DeviceError> {
        // Of one that does not serve this driver, or not yet, it has had nothing.
        let is_told = self.told.iter().any(|told| matches!(told, Told::Start(_)));
        let driver_has_it = self.is_serving && is_told;
        self.lose(Some(&error));
        self.stuck += u32::from(matches!(error, SessionError::Stuck));
        if self.stuck > MOST_STUCK {
            return Err(DeviceFailure::Unservable.of(0));
        }
        match error.is_misbehaviour() && driver_has_it {
            true => Err(DeviceFailure::Backend(Box::new(error)).of(0)),
            false => Ok(()),
        }
    }
}
