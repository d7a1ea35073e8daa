//! The frontend of vhost-user ("Vhost-user Protocol", QEMU's `docs/interop/vhost-user.rst`): a device whose requests another
//! process serves, on shadow queues. That process is not trusted: what it sees is the region, and what it says is judged.

mod arrival;
mod class;
mod config_space;
mod connection;
mod conversation;
mod doorbell;
mod events;
mod frontend;
mod message;
mod selections;
mod session;

pub use arrival::Arrival;
pub use class::{CLASSES, Class, MAX_CONFIG, MAX_QUEUES};
pub use connection::ConnectionError;
pub use conversation::Offer;
pub(crate) use conversation::{Conversation, Driver, Ended, Heard};
pub(crate) use doorbell::Doorbell;
pub use frontend::{Brought, Frontend, Keep, Lasting, Link, Setup};
pub use message::MessageError;
pub(crate) use session::of_system;
pub use session::{SessionError, connection_name};
