//! Devices that a guest is given while it runs, in slots that it was created with: libxl gives it none then, for its device tree
//! is written.
//!
//! One stands in xenstore until it is taken away or its guest ends, so that it outlives the service.

use super::guest_file::{self, FileDevice};
use super::libxl::{self, EntryForm, EntryKey, MAX_DEVICES, XenbusState};
use super::xenstore::{XenStore, XenStoreError};
use super::{AttachError, Identity};

/// Gives `guest` the device, as what key.
///
/// # Errors
///
/// [`AttachError`].
pub(super) fn attach(
    store: &mut XenStore,
    guest: &Identity,
    device: &FileDevice,
) -> Result<EntryKey, AttachError> {
    guest_file::check_room(&device.settings).map_err(AttachError::Settings)?;
    if !guest_file::is_written_of(store, guest)? {
        return Err(AttachError::Unknown);
    }
    for devid in (0..).take(MAX_DEVICES) {
        let form = EntryForm::Attached;
        let key = EntryKey { form, devid };
        if libxl::read_state(store, guest.domid, key)?.is_none() {
            device.write(store, guest.domid, key)?;
            return Ok(key);
        }
    }
    Err(AttachError::Full)
}

/// Begins to take a device away, as libxl does with one of its own.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn detach(store: &mut XenStore, domid: u16, key: EntryKey) -> Result<(), XenStoreError> {
    use XenbusState::{Closing, InitWait, Initialising};
    for from in [Initialising, InitWait] {
        libxl::change_state(store, domid, key, from, Closing)?;
    }
    Ok(())
}

/// A device that is to be taken away has been closed.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn forget(store: &mut XenStore, domid: u16, key: EntryKey) -> Result<(), XenStoreError> {
    if libxl::read_state(store, domid, key)? == Some(XenbusState::Closing) {
        store.remove(&libxl::entry_path(domid, key))?;
    }
    Ok(())
}
