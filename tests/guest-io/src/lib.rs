//! A guest driver that does as it is told, also what no driver should: on the simulator, on the board, for
//! tests, fuzz seeds and benches.

mod blk;
// The kernel's devices in a guest, mapped.
#[allow(unsafe_code)]
pub mod board;
mod driver;
pub mod framing;
#[allow(unsafe_code)]
pub mod gntalloc;
pub mod malformed;
pub mod missteps;
pub mod net;
mod platform;
mod queue;
mod random;

pub use blk::{BlkRequest, NEXT, NO_STATUS, WRITE};
pub use driver::{Driver, Negotiated};
pub use platform::{GrantedMemory, Platform};
pub use queue::{Buffer, RawQueue};
pub use random::Random;
