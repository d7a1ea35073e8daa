//! Who says which devices a guest has, and is told what becomes of them.
//!
//! The supervisor knows a [`Toolstack`] only. Xen's is libxl, which speaks through xenstore; what a file of ours says of a
//! guest is written there too, so that it outlives the service, and is read in one way.

mod attached;
pub mod guest_file;
mod holds;
pub mod libxl;
mod xen;
pub mod xenstore;

use guest_file::FileDevice;
pub use holds::{Pause, XenDomains};
use libxl::{Entry, EntryError, EntryKey, MAX_DEVICES};
use std::error::Error;
use std::os::fd::BorrowedFd;
pub use xen::XenToolstack;
use xenstore::XenStoreError;

/// Tells a guest from all others, whether they have had its domid or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub domid: u16,
    /// The path of its uuid in xenstore.
    pub vm: Option<String>,
}

impl Identity {
    /// Its uuid, which it keeps over a reboot; nothing, where it has none.
    pub(crate) fn uuid(&self) -> &str {
        let path = self.vm.as_deref().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default()
    }

    /// The name of a file of it.
    pub(crate) fn file_name(&self) -> String {
        let uuid = self.vm.as_deref().and_then(|vm| vm.rsplit('/').next());
        format!("{}-{}", self.domid, uuid.unwrap_or("none"))
    }

    /// Whether `now`, of the same domid, is another guest. One that is being destroyed loses its nodes, and is the same still.
    pub(crate) fn is_followed_by(&self, now: &Self) -> bool {
        now.vm.is_some() && now != self
    }
}

/// What may have happened. A toolstack may say so once too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolstackEvent {
    GuestsCame,
    GuestsWent,
    /// Something about one device of a guest.
    Device(u16, EntryKey),
    /// Something about any device.
    AnyDevice,
}

/// How far the toolstack and we have come with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryState {
    /// The toolstack waits for it to be served.
    New,
    /// The toolstack was told that it is served.
    Served,
    /// The toolstack waits for it to be closed.
    Closing,
    Closed,
}

/// Why a toolstack does not answer.
#[derive(Debug, thiserror::Error)]
pub enum ToolstackError {
    /// It concerns one guest.
    #[error(transparent)]
    Refused(Box<dyn Error + Send + Sync>),
    /// Nothing can be asked any more.
    #[error(transparent)]
    Lost(Box<dyn Error + Send + Sync>),
}

/// Why a guest that runs is not given a device.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(transparent)]
    XenStore(#[from] XenStoreError),
    #[error("{0}")]
    Settings(String),
    #[error(
        "the service has not begun with it: either the guest is gone, or its file in /etc/xen-virtiod/guests cannot be used, \
         of which xen-virtioctl check says more"
    )]
    Unknown,
    #[error("it has {MAX_DEVICES} such devices, and can have no more")]
    Full,
}

/// A toolstack, as the supervisor sees it.
///
/// # Errors
///
/// What any call returns is [`ToolstackError::Refused`] where it concerns one guest, which is then left as it is, and
/// [`ToolstackError::Lost`] where there is no toolstack any more, which ends the service.
pub trait Toolstack {
    /// Begins to watch; what is there already is told of by events.
    fn start(&mut self) -> Result<(), ToolstackError>;

    /// Readable when there may be events. Any other call may bring some along, of which it does not tell.
    fn readable(&self) -> BorrowedFd<'_>;

    /// The next event, without waiting for one.
    fn next_event(&mut self) -> Result<Option<ToolstackEvent>, ToolstackError>;

    /// The domids that guests have, or have had.
    fn domids(&mut self) -> Result<Vec<u16>, ToolstackError>;

    /// Whether there is a guest `domid`, and it has been built.
    fn lives(&mut self, domid: u16) -> Result<bool, ToolstackError>;

    /// Which guest has `domid` now, or has had it last.
    fn identify(&mut self, domid: u16) -> Result<Identity, ToolstackError>;

    /// Whether the guest's uuid was given to it: a guest of `init-dom0less` may write its own, and be another one by it.
    fn has_given_uuid(&mut self, domid: u16) -> Result<bool, ToolstackError>;

    /// The name that the guest's owner calls it by.
    fn name(&mut self, domid: u16) -> Result<Option<String>, ToolstackError>;

    /// A guest has come up, and may be given what describes its devices. One that is `served` has had that.
    fn guest_came(&mut self, guest: &Identity, served: bool) -> Result<(), ToolstackError>;

    /// A guest is gone. Another one may have its domid already.
    fn guest_went(&mut self, guest: &Identity) -> Result<(), ToolstackError>;

    /// Keeps a guest from running until [`Toolstack::let_run`], also over this service's end. Xen may refuse that, which is logged.
    fn hold(&mut self, guest: &Identity) -> Result<(), ToolstackError>;

    /// Lets a guest run that is held; of any other this does nothing.
    fn let_run(&mut self, guest: &Identity) -> Result<(), ToolstackError>;

    /// The guests that were held by an earlier service, and live.
    fn held(&mut self) -> Result<Vec<Identity>, ToolstackError>;

    /// Forgets what is left of guests that are gone, which nobody has seen go.
    fn sweep(&mut self) -> Result<(), ToolstackError>;

    /// Every device that there is, by its guest.
    fn devices(&mut self) -> Result<Vec<(u16, EntryKey)>, ToolstackError>;

    /// `None` if the device is gone.
    fn state(&mut self, domid: u16, key: EntryKey) -> Result<Option<EntryState>, ToolstackError>;

    /// What a device is to be.
    fn device(&mut self, domid: u16, key: EntryKey) -> Result<Entry, EntryError>;

    /// What the guest's owner calls a device, if it has a name of its own.
    fn device_name(&mut self, domid: u16, key: EntryKey) -> Result<Option<String>, ToolstackError>;

    /// Tells the toolstack that a device is served, unless it waits for something else.
    fn tell_ready(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError>;

    /// Tells the toolstack that a device is closed, if it waits for that.
    fn tell_closed(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError>;

    /// Gives a guest that runs a device, which is told of by an event.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    fn attach(&mut self, guest: &Identity, device: &FileDevice) -> Result<EntryKey, AttachError>;

    /// Begins to take away a device that was given so, which is told of by an event.
    fn detach(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError>;

    /// The guest of `domid`, if there is one.
    fn living(&mut self, domid: u16) -> Result<Option<Identity>, ToolstackError> {
        match self.lives(domid)? {
            true => Ok(Some(self.identify(domid)?)),
            false => Ok(None),
        }
    }

    /// The devices of a guest that the toolstack has not begun to take away, and whether it was told that they are served.
    fn active_devices(&mut self, domid: u16) -> Result<Vec<(EntryKey, bool)>, ToolstackError> {
        let mut active = Vec::new();
        for (other, key) in self.devices()? {
            if other != domid {
                continue;
            }
            match self.state(domid, key)? {
                Some(EntryState::New) => active.push((key, false)),
                Some(EntryState::Served) => active.push((key, true)),
                Some(EntryState::Closing | EntryState::Closed) | None => {}
            }
        }
        Ok(active)
    }
}
