//! Event channels (`/dev/xen/evtchn`).

use super::abi;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use xen_sys::evtchn_port_t;
use xen_virtio_guest_mapping::syscalls;
use xen_virtio_guest_mapping::xen::Domid;

/// Ports taken in by one read.
const BATCH: usize = 64;

/// The event channels between this process and one guest's vCPUs.
#[derive(Debug)]
pub struct EventChannels {
    file: File,
    domid: Domid,
}

impl EventChannels {
    /// Restricts `file`, an open `/dev/xen/evtchn`, to `domid` for good, whoever has it.
    ///
    /// # Errors
    ///
    /// The kernel's, for a file that is not evtchn or is restricted already.
    pub fn restrict(file: &File, domid: Domid) -> io::Result<()> {
        let request = abi::EvtchnRestrictDomid { domid: domid.0 };
        // SAFETY: the kernel reads the request.
        unsafe { abi::evtchn_restrict_domid(file.as_raw_fd(), &raw const request) }?;
        Ok(())
    }

    /// `file` is in non-blocking mode, and restricted to `domid`.
    pub fn new(file: File, domid: Domid) -> Self {
        Self { file, domid }
    }

    /// Connects to a port that the guest's domain has open for us; returns our end of it.
    pub(super) fn bind(&self, remote_port: evtchn_port_t) -> io::Result<evtchn_port_t> {
        let request = abi::EvtchnBindInterdomain {
            remote_domain: self.domid.0.into(),
            remote_port,
        };
        // SAFETY: the kernel reads the request; its result is the port.
        let port =
            unsafe { abi::evtchn_bind_interdomain(self.file.as_raw_fd(), &raw const request) }?;
        port.try_into().map_err(io::Error::other)
    }

    pub(super) fn notify(&self, port: evtchn_port_t) -> io::Result<()> {
        let request = abi::EvtchnPort { port };
        syscalls::count();
        // SAFETY: the kernel reads the request.
        unsafe { abi::evtchn_notify(self.file.as_raw_fd(), &raw const request) }?;
        Ok(())
    }

    /// Takes in every event that is waiting, and lets their ports fire again.
    pub(super) fn clear(&self) -> io::Result<()> {
        let mut ports = [0; BATCH * size_of::<evtchn_port_t>()];
        loop {
            syscalls::count();
            match (&self.file).read(&mut ports) {
                Ok(0) => return Ok(()),
                Ok(len) => {
                    // Writing a port back unmasks it.
                    syscalls::count();
                    (&self.file).write_all(&ports[..len])?;
                    // What comes now is an event of its own.
                    if len < ports.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for EventChannels {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn every_port_that_has_fired_may_fire_again() {
        let (mut xen, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        xen.set_nonblocking(true).unwrap();
        let channels = EventChannels::new(File::from(OwnedFd::from(ours)), Domid(1));
        for count in [0, 1, BATCH, BATCH + 1, 3 * BATCH] {
            let ports = (0..).take(count).flat_map(evtchn_port_t::to_ne_bytes);
            let ports: Vec<u8> = ports.collect();
            xen.write_all(&ports).unwrap();
            channels.clear().unwrap();
            let mut unmasked = vec![0; ports.len() + 1];
            let len = xen.read(&mut unmasked).unwrap_or(0);
            assert_eq!(unmasked[..len], ports);
        }
    }
}
