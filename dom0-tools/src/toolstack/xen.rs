//! Xen's toolstack: libxl, and files of guests that it does not describe, both through xenstore.

use super::attached;
use super::guest_file::{self, FileDevice, GuestFileError, GuestFiles};
use super::holds::{self, Pause};
use super::libxl::{self, Entry, EntryError, EntryForm, EntryKey, XenbusState, entry_path};
use super::xenstore::{XenStore, XenStoreError};
use super::{AttachError, EntryState, Identity, Toolstack, ToolstackError, ToolstackEvent};
use crate::text::without_controls;
use std::os::fd::{AsFd, BorrowedFd};
use xen_virtio_backend::LogLimit;

/// The tokens of watches on domains that come and go; those of the others are their directories.
const INTRODUCE: &str = "introduce";
const RELEASE: &str = "release";

/// A [`Toolstack`] over xenstore.
pub struct XenToolstack {
    store: XenStore,
    files: GuestFiles,
    domains: Box<dyn Pause>,
    /// Of files that cannot be used.
    log_limit: LogLimit,
}

impl XenToolstack {
    /// The toolstack that speaks through `store`, and that of guests which `files` describe; `domains` keeps guests from running.
    pub fn new(store: XenStore, files: GuestFiles, domains: Box<dyn Pause>) -> Self {
        Self {
            store,
            files,
            domains,
            log_limit: LogLimit::default(),
        }
    }
}

impl From<XenStoreError> for ToolstackError {
    fn from(error: XenStoreError) -> Self {
        match error {
            XenStoreError::Refused { .. } => Self::Refused(Box::new(error)),
            XenStoreError::Connect(_) | XenStoreError::Connection(_) => Self::Lost(Box::new(error)),
        }
    }
}

impl From<XenbusState> for EntryState {
    fn from(state: XenbusState) -> Self {
        match state {
            XenbusState::Initialising => Self::New,
            XenbusState::InitWait => Self::Served,
            XenbusState::Closing => Self::Closing,
            XenbusState::Closed => Self::Closed,
        }
    }
}

impl Toolstack for XenToolstack {
    fn start(&mut self) -> Result<(), ToolstackError> {
        for form in EntryForm::ALL {
            let directory = form.directory();
            self.store
                .watch(&format!("backend/{directory}"), directory)?;
        }
        self.store.watch("@releaseDomain", RELEASE)?;
        // Which tells of those that are there already, too.
        Ok(self.store.watch("@introduceDomain", INTRODUCE)?)
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.store.as_fd()
    }

    fn next_event(&mut self) -> Result<Option<ToolstackEvent>, ToolstackError> {
        let Some(event) = self.store.next_event()? else {
            return Ok(None);
        };
        Ok(Some(match event.token.as_str() {
            RELEASE => ToolstackEvent::GuestsWent,
            INTRODUCE => ToolstackEvent::GuestsCame,
            _ => match libxl::parse_path(&event.path) {
                Some((domid, key)) => ToolstackEvent::Device(domid, key),
                // A whole directory, as at the start, or as one that is removed.
                None => ToolstackEvent::AnyDevice,
            },
        }))
    }

    fn domids(&mut self) -> Result<Vec<u16>, ToolstackError> {
        let domids = self.store.directory("/local/domain")?;
        Ok(domids
            .iter()
            .filter_map(|domid| domid.parse().ok())
            .collect())
    }

    fn lives(&mut self, domid: u16) -> Result<bool, ToolstackError> {
        Ok(self.store.is_introduced(domid)?)
    }

    fn identify(&mut self, domid: u16) -> Result<Identity, ToolstackError> {
        let vm = self.store.read(&vm_path(domid))?;
        Ok(Identity { domid, vm })
    }

    fn has_given_uuid(&mut self, domid: u16) -> Result<bool, ToolstackError> {
        Ok(self.store.owner(&vm_path(domid))? == Some(0))
    }

    fn name(&mut self, domid: u16) -> Result<Option<String>, ToolstackError> {
        Ok(self.store.read(&format!("/local/domain/{domid}/name"))?)
    }

    fn guest_came(&mut self, guest: &Identity, served: bool) -> Result<(), ToolstackError> {
        match self.files.announce(&mut self.store, guest, served) {
            Ok(()) => Ok(()),
            Err(GuestFileError::XenStore(error)) => Err(error.into()),
            Err(error) => {
                if self.log_limit.allow() {
                    let error = format!("{:#}", anyhow::Error::from(error));
                    tracing::error!(
                        domid = guest.domid,
                        "it gets no device by its file: {}",
                        without_controls(error.chars())
                    );
                }
                Ok(())
            }
        }
    }

    fn guest_went(&mut self, guest: &Identity) -> Result<(), ToolstackError> {
        holds::forget(&mut self.store, guest)?;
        Ok(guest_file::forget(&mut self.store, guest)?)
    }

    fn hold(&mut self, guest: &Identity) -> Result<(), ToolstackError> {
        Ok(holds::hold(&mut self.store, &*self.domains, guest)?)
    }

    fn let_run(&mut self, guest: &Identity) -> Result<(), ToolstackError> {
        Ok(holds::release(&mut self.store, &*self.domains, guest)?)
    }

    fn held(&mut self) -> Result<Vec<Identity>, ToolstackError> {
        let mut held = Vec::new();
        for domid in holds::held(&mut self.store)? {
            if let Some(guest) = self.living(domid)?
                && holds::is_held(&mut self.store, &guest)?
            {
                held.push(guest);
            }
        }
        Ok(held)
    }

    fn sweep(&mut self) -> Result<(), ToolstackError> {
        for domid in holds::held(&mut self.store)? {
            let guest = self.living(domid)?;
            holds::keep_only(&mut self.store, domid, guest.as_ref())?;
        }
        for domid in guest_file::written(&mut self.store)? {
            let guest = match domid.parse() {
                Ok(domid) => self.living(domid)?,
                Err(_) => None,
            };
            guest_file::keep_only(&mut self.store, &domid, guest.as_ref())?;
        }
        Ok(())
    }

    fn devices(&mut self) -> Result<Vec<(u16, EntryKey)>, ToolstackError> {
        Ok(libxl::entries(&mut self.store)?)
    }

    fn state(&mut self, domid: u16, key: EntryKey) -> Result<Option<EntryState>, ToolstackError> {
        let state = libxl::read_state(&mut self.store, domid, key)?;
        Ok(state.map(EntryState::from))
    }

    fn device(&mut self, domid: u16, key: EntryKey) -> Result<Entry, EntryError> {
        libxl::read_entry(&mut self.store, domid, key)
    }

    fn device_name(&mut self, domid: u16, key: EntryKey) -> Result<Option<String>, ToolstackError> {
        Ok(self
            .store
            .read(&format!("{}/dev", entry_path(domid, key)))?)
    }

    fn tell_ready(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError> {
        Ok(libxl::tell_ready(&mut self.store, domid, key)?)
    }

    fn tell_closed(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError> {
        match key.form {
            EntryForm::Attached => attached::forget(&mut self.store, domid, key)?,
            EntryForm::Disk | EntryForm::Virtio | EntryForm::File => {
                libxl::tell_closed(&mut self.store, domid, key)?;
            }
        }
        Ok(())
    }

    fn attach(&mut self, guest: &Identity, device: &FileDevice) -> Result<EntryKey, AttachError> {
        attached::attach(&mut self.store, guest, device)
    }

    fn detach(&mut self, domid: u16, key: EntryKey) -> Result<(), ToolstackError> {
        Ok(attached::detach(&mut self.store, domid, key)?)
    }
}

/// Where the path of a guest's uuid is.
fn vm_path(domid: u16) -> String {
    format!("/local/domain/{domid}/vm")
}

#[cfg(test)]
mod tests {
    use super::super::xenstore::sim::SimStore;
    use super::*;
    use std::path::Path;

    #[test]
    fn a_guest_that_may_write_its_uuid_was_given_none() {
        let (sim, store) = SimStore::new();
        sim.introduce(1, "ivi", "a");
        sim.introduce_owner(2, "dom0less-2", "a");
        let files = GuestFiles::new(Path::new("/there/is/none"));
        let mut toolstack = XenToolstack::new(store, files, Box::new(sim.clone()));
        let given = [1, 2, 3].map(|domid| toolstack.has_given_uuid(domid).unwrap());
        assert_eq!(given, [true, false, false]);
    }
}
