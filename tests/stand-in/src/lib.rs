//! A vhost-user back-end that serves a disk, and misbehaves to order.

mod connection;
mod manner;
mod rings;

use connection::Connection;
pub use manner::{MANNERS, Manner, Moment, Request};
use std::fs::File;
use std::os::unix::net::UnixListener;

/// Serves the disk `image` to one frontend after the other, in this manner, until the listener is shut down.
pub fn serve(listener: &UnixListener, image: &File, manner: Manner) {
    while let Ok((socket, _)) = listener.accept() {
        // Whatever ends a connection, the next one is served.
        let _ = Connection::new(socket, image, manner).and_then(Connection::serve);
    }
}
