//! Linux's own back-ends, vhost-vsock and vhost-net (`linux/vhost.h`): the kernel serves the shadow queues of a
//! [`Frontend`](crate::vhost_user::Frontend). The memory table that it is given has the region and nothing else, so that it
//! sees nothing of the guest.

pub mod abi;
// Makes the calls.
#[allow(unsafe_code)]
mod calls;
mod session;

pub use calls::set_guest_cid;
pub(crate) use session::KernelSession;

use std::os::fd::OwnedFd;

/// A vhost device of the kernel's, opened by whoever may.
#[derive(Debug)]
pub struct Kernel {
    device: OwnedFd,
    kind: Kind,
    /// The kernel knows whose memory its queues are in.
    is_owned: bool,
}

#[derive(Debug)]
enum Kind {
    Vsock,
    Net { tap: OwnedFd },
}

impl Kernel {
    /// `/dev/vhost-vsock`, which has been told its guest's number: [`set_guest_cid`].
    pub fn vsock(device: OwnedFd) -> Self {
        Self::new(device, Kind::Vsock)
    }

    /// `/dev/vhost-net`, which moves frames between the queues and `tap`: [`attach`](crate::tap::attach).
    pub fn net(device: OwnedFd, tap: OwnedFd) -> Self {
        Self::new(device, Kind::Net { tap })
    }

    fn new(device: OwnedFd, kind: Kind) -> Self {
        Self {
            device,
            kind,
            is_owned: false,
        }
    }
}
