//! A device that vhost-user back-ends serve, on the simulator.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xen_virtio_backend::vhost_user::{Arrival, Class, Frontend, Lasting, Link, Setup};
use xen_virtio_backend::{
    Device, DeviceError, Identity, Interest, QueueError, QueueIndex, QueueStart, RequestCounters,
    Step,
};
use xen_virtio_guest_mapping::GuestAccess;

/// How often a back-end is looked for.
const LOOK: Duration = Duration::from_millis(2);

/// A device whose back-ends are looked for at `socket`, as the supervisor would.
pub struct Reconnecting {
    frontend: Frontend,
    link: Link,
    socket: PathBuf,
}

impl Reconnecting {
    /// A device of `class`, once its first back-end has said what it has.
    ///
    /// # Errors
    ///
    /// If there is none for ten seconds, or it is of no use.
    pub fn new(socket: &Path, class: &'static Class) -> io::Result<Self> {
        let connection = OwnedFd::from(connect(socket)?);
        let mut arrival = Arrival::new(connection, class).map_err(io::Error::other)?;
        let offer = loop {
            if let Some(offer) = arrival.step().map_err(io::Error::other)? {
                break offer.clone();
            }
        };
        let setup = Setup {
            class,
            queue_size: 64,
            pool: 1 << 20,
            config: Vec::new(),
            features: 0,
        };
        let link = Link::default();
        let lasting = Lasting::nothing(offer.queues, class.queue_size)?;
        let frontend =
            Frontend::new(setup, &offer, link.clone(), lasting).map_err(io::Error::other)?;
        Ok(Self {
            frontend: frontend.with(arrival).map_err(io::Error::other)?,
            link,
            socket: socket.to_owned(),
        })
    }

    fn look(&mut self) {
        if !self.frontend.is_connected()
            && let Ok(connection) = UnixStream::connect(&self.socket)
        {
            self.link.put(connection.into());
            self.frontend.update();
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
