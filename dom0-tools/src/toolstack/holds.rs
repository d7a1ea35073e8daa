//! Guests that are kept from running until their devices are served.
//!
//! A guest's kernel ends at an access that nobody has claimed, and its toolstack waits for libxl's disks only. Xen counts who has
//! paused a domain: a guest that somebody else has paused too runs when both have let it go.

use super::Identity;
use super::guest_file::mark;
use super::xenstore::{XenStore, XenStoreError};
use std::fs::File;
use std::io;
use xen_virtio_guest_mapping::xen::Domid;
use xen_virtio_transport::xen::DomainControl;

/// Where it stands of whom, so that the next service lets go of those that this one cannot.
const DIRECTORY: &str = "backend/virtio_held";

/// Pauses domains, as [`DomainControl`] does.
pub trait Pause {
    /// # Errors
    ///
    /// [`DomainControl::pause`].
    fn pause(&self, domid: u16) -> io::Result<()>;

    /// # Errors
    ///
    /// [`DomainControl::unpause`].
    fn unpause(&self, domid: u16) -> io::Result<()>;
}

/// Xen's domains. What it takes to pause one is open no longer than that.
pub struct XenDomains;

impl XenDomains {
    fn control() -> io::Result<DomainControl> {
        let open = |path| File::options().read(true).write(true).open(path);
        DomainControl::new(open("/dev/xen/privcmd")?, &open("/dev/xen/hypercall")?)
    }
}

impl Pause for XenDomains {
    fn pause(&self, domid: u16) -> io::Result<()> {
        Self::control()?.pause(Domid(domid))
    }

    fn unpause(&self, domid: u16) -> io::Result<()> {
        Self::control()?.unpause(Domid(domid))
    }
}

fn path(domid: u16) -> String {
    format!("{DIRECTORY}/{domid}")
}

/// Whether `guest` is held, by this service or an earlier one.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn is_held(store: &mut XenStore, guest: &Identity) -> Result<bool, XenStoreError> {
    Ok(store.read(&path(guest.domid))?.as_deref() == Some(mark(guest)))
}

/// Keeps `guest` from running until [`release`]; one that cannot be is logged.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn hold(
    store: &mut XenStore,
    domains: &dyn Pause,
    guest: &Identity,
) -> Result<(), XenStoreError> {
    if is_held(store, guest)? {
        return Ok(());
    }
    // First: a guest that is paused without it stays so.
    store.write(&path(guest.domid), mark(guest))?;
    if let Err(error) = domains.pause(guest.domid) {
        store.remove(&path(guest.domid))?;
        tracing::warn!(
            domid = guest.domid,
            "it cannot be kept from running until its devices are served, and panics if it is faster than they are: Xen \
             refuses to pause it: {error}; create it paused (xl create -p), and unpause it when xen-virtioctl wait has succeeded"
        );
    }
    Ok(())
}

/// Lets `guest` run, if it is held.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn release(
    store: &mut XenStore,
    domains: &dyn Pause,
    guest: &Identity,
) -> Result<(), XenStoreError> {
    if !is_held(store, guest)? {
        return Ok(());
    }
    if let Err(error) = domains.unpause(guest.domid) {
        tracing::warn!(
            domid = guest.domid,
            "its devices are served, and Xen refuses to unpause it: {error}; xl unpause lets it run"
        );
    }
    store.remove(&path(guest.domid))?;
    Ok(())
}

/// Forgets that a guest was held which is gone. Another one may have its domid already.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn forget(store: &mut XenStore, guest: &Identity) -> Result<(), XenStoreError> {
    if is_held(store, guest)? {
        store.remove(&path(guest.domid))?;
    }
    Ok(())
}

/// Forgets whom of `domid` was held, but for `guest`, which has it now.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn keep_only(
    store: &mut XenStore,
    domid: u16,
    guest: Option<&Identity>,
) -> Result<(), XenStoreError> {
    let is_kept = guest.map(|guest| is_held(store, guest)).transpose()?;
    if is_kept != Some(true) {
        store.remove(&path(domid))?;
    }
    Ok(())
}

/// The domids of which a guest was held.
///
/// # Errors
///
/// [`XenStoreError`].
pub(super) fn held(store: &mut XenStore) -> Result<Vec<u16>, XenStoreError> {
    let domids = store.directory(DIRECTORY)?;
    Ok(domids
        .iter()
        .filter_map(|domid| domid.parse().ok())
        .collect())
}
