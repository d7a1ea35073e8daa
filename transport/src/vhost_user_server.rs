//! A device at a vhost-user socket ("Vhost-user Protocol", QEMU's `docs/interop/vhost-user.rst`): the driver of any VMM's guest
//! reaches it as a Xen guest's does, over the same [`Host`](crate::Host).

mod events;
mod requests;
mod served;
mod vring;

use served::Served;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use xen_virtio_backend::Device;

/// How long to wait for what the system lacks.
const SHORTAGE_WAIT: Duration = Duration::from_millis(100);

/// Why a device is not served any more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the socket accepts nobody")]
    Socket(#[source] io::Error),
    #[error("the device cannot be waited for")]
    System(#[from] io::Error),
}

/// Serves `device` to whoever connects, one after the other.
///
/// # Errors
///
/// [`ServeError`]: what a VMM does ends its connection only.
pub fn serve(device: Box<dyn Device>, listener: &UnixListener) -> Result<(), ServeError> {
    let served = Served::new(device)?;
    // The library would share it among threads, of which there is one.
    #[allow(clippy::arc_with_non_send_sync)]
    let served = Arc::new(Mutex::new(served));
    loop {
        let (socket, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Nothing tells of a descriptor that is to be had again.
            Err(error) if is_shortage(&error) => {
                std::thread::sleep(SHORTAGE_WAIT);
                continue;
            }
            Err(error) => return Err(ServeError::Socket(error)),
        };
        tracing::info!("a VMM is there");
        match converse(&served, socket) {
            Ok(()) => tracing::info!("the VMM is gone"),
            Err(error) => tracing::warn!("the VMM is given up: {error}"),
        }
        lock(&served).begin_anew();
    }
}

/// Serves one VMM until it goes.
fn converse(served: &Arc<Mutex<Served>>, socket: UnixStream) -> Result<(), ProtocolError> {
    let watched = socket.try_clone().map_err(ProtocolError::SocketError)?;
    let hear = lock(served).hear(watched);
    hear.map_err(ProtocolError::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(socket, Arc::clone(served));
    loop {
        let heard = lock(served).go_on();
        if heard.map_err(ProtocolError::SocketError)? {
            match handler.handle_request() {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    let shortages = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS];
    let aborted = error.kind() == io::ErrorKind::ConnectionAborted;
    aborted
        || error
            .raw_os_error()
            .is_some_and(|errno| shortages.contains(&errno))
}

fn lock(served: &Mutex<Served>) -> MutexGuard<'_, Served> {
    served.lock().unwrap_or_else(PoisonError::into_inner)
}
