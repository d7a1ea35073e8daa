//! Shadow queues: rings and data of a device in one memory of ours, for a back-end that maps it in place of the guest's.
//!
//! A request that the guest makes available is copied into the [`Region`] and offered there in buffers like the guest's, so that
//! no device has to be understood; whole pages and what follows them are one buffer. What the back-end has used is copied out and
//! given back to the guest. The back-end reaches the region, and nothing of the guest's; what it writes there is judged as a
//! guest's rings are.

mod loss;
mod pools;
mod record;
mod region;
mod relay;
mod relaying;
mod ring;

pub use loss::{Answer, Loss, Rules};
pub use record::ShadowRecord;
pub(crate) use region::region_file;
pub use region::{Region, RingPlaces};
pub use relay::{Relay, RelayError};
pub use ring::BackendFault;
