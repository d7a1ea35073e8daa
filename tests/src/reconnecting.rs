//! A device that vhost-user back-ends serve, on the simulator.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use xen_virtio_backend::vhost_user::{
    Arrival, Brought, Class, Frontend, Lasting, Link, Offer, Setup,
};
use xen_virtio_backend::{
    Device, DeviceError, Identity, Interest, QueueError, QueueIndex, QueueStart, RequestCounters,
    Step,
};
use xen_virtio_guest_mapping::GuestAccess;

/// Entries of its queues, and bytes for data.
const SIZE: u16 = 64;
const POOL: usize = 1 << 20;

/// How often a back-end is looked for at first.
const LOOK: Duration = Duration::from_millis(2);
/// … and between connections. Nobody has a duplicate of those, as a supervisor has: one that descriptors are left in stays open,
/// and so can only few of them.
const RECONNECT: Duration = Duration::from_millis(100);

/// What is done for a device before each of its steps, as a supervisor would.
pub type Look = Box<dyn FnMut(&mut Frontend, &Link)>;

/// A device whose back-ends are looked for.
pub struct Reconnecting {
    frontend: Frontend,
    link: Link,
    look: Look,
}

impl Reconnecting {
    /// A device of `class`, once its first back-end at `socket` has said what it has; the next ones are looked for there.
    ///
    /// # Errors
    ///
    /// If there is none for ten seconds, or it is of no use.
    pub fn new(socket: &Path, class: &'static Class) -> io::Result<Self> {
        let (arrival, offer) = arrive(socket, class, POOL)?;
        let setup = Setup {
            class,
            queue_size: SIZE,
            pool: POOL,
            config: Vec::new(),
            features: 0,
        };
        let link = Link::default();
        let lasting = Lasting::nothing(offer.queues, class.queue_size)?;
        let frontend = Frontend::new(setup, &offer, link.clone(), lasting);
        let frontend = frontend.and_then(|frontend| frontend.with(arrival));
        let socket = socket.to_owned();
        let mut last = Instant::now();
        let look = move |frontend: &mut Frontend, link: &Link| {
            if frontend.is_connected() {
                last = Instant::now();
            } else if last.elapsed() >= RECONNECT
                && let Ok(connection) = UnixStream::connect(&socket)
                && let Ok(brought) = Brought::new(connection.into(), SIZE, POOL)
            {
                last = Instant::now();
                link.put(brought);
                frontend.update();
            }
        };
        let frontend = frontend.map_err(io::Error::other)?;
        Ok(Self::looking(frontend, link, Box::new(look)))
    }

    /// A device that is connected by `look`.
    pub fn looking(frontend: Frontend, link: Link, look: Look) -> Self {
        Self {
            frontend,
            link,
            look,
        }
    }

    fn look(&mut self) {
        (self.look)(&mut self.frontend, &self.link);
    }
}

/// A back-end of a device of `class` with `pool` bytes for data, once it has said what it has.
///
/// # Errors
///
/// As [`Reconnecting::new`].
pub fn arrive(socket: &Path, class: &'static Class, pool: usize) -> io::Result<(Arrival, Offer)> {
    let brought = Brought::new(connect(socket)?.into(), SIZE, pool)?;
    let mut arrival = Arrival::new(brought, class).map_err(io::Error::other)?;
    loop {
        if let Some(offer) = arrival.step().map_err(io::Error::other)? {
            let offer = offer.clone();
            return Ok((arrival, offer));
        }
    }
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < end => std::thread::sleep(LOOK),
            connected => return connected,
        }
    }
}

impl Device for Reconnecting {
    fn identity(&self) -> &Identity {
        self.frontend.identity()
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        self.frontend.read_config(offset, to);
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.frontend.start_queue(index, start, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        self.look();
        self.frontend.step(access)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        self.frontend.prepare_sleep(access)
    }

    fn try_again_at(&self) -> Option<Instant> {
        let is_away = !self.frontend.is_connected();
        let looks = is_away.then(|| Instant::now() + LOOK);
        looks.into_iter().chain(self.frontend.try_again_at()).min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        self.frontend.sources(add);
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.frontend.close_queue(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.frontend.stop_queue(index);
    }

    fn settle(&mut self) -> bool {
        self.look();
        self.frontend.settle()
    }

    fn reset(&mut self) {
        self.frontend.reset();
    }

    fn counters(&self) -> RequestCounters {
        self.frontend.counters()
    }
}
