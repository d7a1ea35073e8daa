//! What a worker builds a device of, in the sandbox, and what it has then.

use crate::guest_state::DeviceRecords;
use crate::ipc::WorkerEnd;
use crate::toolstack::libxl::EntryKey;
use anyhow::Result;
use serde_json::Value;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;
use xen_virtio_backend::{Device, RingStock};

/// A device that a worker is to build.
pub(crate) struct NewDevice<'a> {
    pub(crate) key: EntryKey,
    pub(crate) served: bool,
    pub(crate) spec: Value,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// What it keeps beyond the worker.
    pub(crate) records: &'a DeviceRecords<'a>,
}

/// What a worker has for its devices.
pub(crate) struct Resources<'a> {
    pub(crate) rings: &'a RingStock,
    pub(crate) vcpus: usize,
    /// The guest is being answered already.
    pub(crate) begun: bool,
    /// Devices that were detached are not done yet.
    pub(crate) has_leaving: bool,
    /// By which the supervisor is asked for something, if there is one.
    pub(crate) channel: Option<&'a Rc<WorkerEnd>>,
}

/// A device, and what changes it from outside.
pub(crate) struct Built {
    pub(crate) device: Box<dyn Device>,
    pub(crate) control: Option<Box<dyn Control>>,
    /// What is known of it now and is to be known of it when its guest begins anew, which may be before it can be asked again.
    pub(crate) known: Option<Value>,
}

/// A device, now or later.
pub(crate) enum Building {
    Ready(Built),
    /// It waits for somebody to say what it is to be.
    Arriving(Box<dyn Arriving>),
}

impl From<Built> for Building {
    fn from(built: Built) -> Self {
        Self::Ready(built)
    }
}

/// A device that waits for somebody to say what it is to be.
pub(crate) trait Arriving {
    /// Readable when [`Arriving::step`] is to be called.
    fn readable(&self) -> BorrowedFd<'_>;

    /// When it is to be called all the same.
    fn due(&self) -> Option<Instant>;

    /// Whether all is known.
    ///
    /// # Errors
    ///
    /// As [`DeviceKind::build`].
    fn step(&mut self) -> Result<bool>;

    /// Builds the device, of which all is known, with what it keeps.
    ///
    /// # Errors
    ///
    /// As [`DeviceKind::build`].
    fn finish(self: Box<Self>, records: &DeviceRecords<'_>) -> Result<Built>;
}

/// Changes a device that runs.
pub(crate) trait Control {
    /// Has the device's next [`Device::update`] take `change` up, with the descriptors that came beside.
    ///
    /// # Errors
    ///
    /// If it is none of the device's.
    fn change(&self, change: &Value, descriptors: Vec<OwnedFd>) -> Result<()>;

    /// The name of the connection by which its back-end has had the memory since the last look, if it has: the guest's next worker
    /// is to have both.
    fn shared(&self) -> Option<u64> {
        None
    }

    /// The driver has been told of the last change, or the next worker tells it once more.
    fn told(&self) {}
}

/// A system call that a worker may make.
pub(crate) struct SyscallRule {
    pub(crate) call: i64,
    /// One of its arguments, counted from zero, and the values that it may have.
    pub(crate) argument: Option<(u8, Vec<u64>)>,
}
