//! dom0's interfaces: opened for devices, made for them, and taken away.
//!
//! This wants what the service has no other use for: `CAP_NET_ADMIN`, dom0's own network namespace, and whatever scripts of xl's do. So
//! a process of its own may do it for the service ([`super::helper`]). What is asked is the same either way.

use super::made::{self, MadeInterface};
use super::{helper, settings};
use crate::devices::{Busy, in_use, open_device};
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use xen_virtio_backend::tap;

pub(super) const INTERFACES: &str = "/sys/class/net";

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::devices) enum Request {
    /// Answered by a descriptor for each queue.
    Open(Opening),
    /// Takes an interface from its bridge, and away, unless somebody does so.
    End(MadeInterface),
    /// As `End`, if it is there.
    EndLeft(MadeInterface),
    /// Answered by the names of the interfaces that were made.
    Names,
    /// Removes an interface whose device is gone, without its script: what that was is not known.
    Remove(String),
}

/// An interface that a device is to have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::devices) struct Opening {
    pub(in crate::devices) interface: String,
    pub(in crate::devices) mac: [u8; 6],
    pub(in crate::devices) mtu: Option<u16>,
    pub(in crate::devices) queues: u16,
    /// It is made for the device.
    pub(in crate::devices) made: Option<MadeInterface>,
    /// The device has none yet.
    pub(in crate::devices) is_new: bool,
    /// The guest has had the device from an earlier worker.
    pub(in crate::devices) served: bool,
}

#[derive(Debug, Default)]
pub(in crate::devices) struct Answer {
    pub(in crate::devices) descriptors: Vec<OwnedFd>,
    pub(in crate::devices) names: Vec<String>,
}

/// Why something was not done.
pub(in crate::devices) enum Failure {
    /// It is wrong, or [`Busy`].
    Refused(anyhow::Error),
    /// Whoever it is left to has not answered, and may have done it.
    Unanswered(String),
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error) => error,
            Failure::Unanswered(why) => Busy(why).into(),
        }
    }
}

/// Has it done, here or by whoever it is left to.
///
/// # Errors
///
/// [`Failure`].
pub(in crate::devices) fn ask(request: &Request) -> Result<Answer, Failure> {
    match helper::socket() {
        Some(socket) => helper::ask(socket, request),
        None => perform(request).map_err(Failure::Refused),
    }
}

pub(super) fn perform(request: &Request) -> Result<Answer> {
    let mut answer = Answer::default();
    match request {
        Request::Open(opening) => answer.descriptors = opening.perform()?,
        Request::EndLeft(made) if !exists(&made.interface) => {}
        Request::End(made) | Request::EndLeft(made) => {
            if !made::is_ending(&made.interface) {
                made.end();
            }
        }
        Request::Names => answer.names = made::names(),
        Request::Remove(name) => made::remove_left(name)?,
    }
    Ok(answer)
}

pub(super) fn exists(name: &str) -> bool {
    Path::new(INTERFACES).join(name).exists()
}

/// Says how interface `name` is made, with several queues or one, if it is not there. The kernel would make one by that name
/// itself, which nobody has put anywhere.
pub(super) fn missing(name: &str, several: bool) -> Option<String> {
    let queues = if several { " multi_queue" } else { "" };
    (!exists(name))
        .then(|| format!("there is no interface {name}: ip tuntap add dev {name} mode tap{queues}"))
}

impl Opening {
    fn perform(&self) -> Result<Vec<OwnedFd>> {
        let name = &self.interface;
        let missing = missing(name, self.queues > 1);
        if let (Some(missing), None) = (&missing, &self.made) {
            bail!(missing.clone());
        }
        if self.is_new {
            self.check_mtu()?;
            let bridge = self.made.as_ref().and_then(MadeInterface::own_bridge);
            if let Some(missing) = bridge.and_then(settings::missing_bridge) {
                bail!(missing);
            }
        }
        made::check_ending(name)?;
        let queues = self.open()?;
        if let Some(made) = &self.made
            && (self.is_new || missing.is_some())
        {
            made.begin(queues.first().expect("at least one"))?;
        }
        Ok(queues)
    }

    /// Whether the interface takes no larger packets than the guest is told of, which it would have to drop.
    fn check_mtu(&self) -> Result<()> {
        let Some(mtu) = self.mtu else { return Ok(()) };
        // One that is made gets that of its bridge.
        let name = match &self.made {
            None => &self.interface,
            Some(made) => match &made.made.bridge {
                None => return Ok(()),
                Some(bridge) => bridge,
            },
        };
        let of_interface = fs::read_to_string(Path::new(INTERFACES).join(name).join("mtu"))
            .with_context(|| format!("asking {name} for its mtu"))?;
        ensure!(
            of_interface.trim() == mtu.to_string(),
            "mtu = {mtu}, and {name} has {}: ip link set {name} mtu {mtu}",
            of_interface.trim()
        );
        Ok(())
    }

    /// The file whose descriptors are queues of the interface.
    fn file(&self) -> Result<PathBuf> {
        let name = &self.interface;
        let interface = Path::new(INTERFACES).join(name);
        if !interface.join("macvtap").exists() {
            return Ok("/dev/net/tun".into());
        }
        // It receives what is for its own address, and nothing else.
        let address = fs::read_to_string(interface.join("address"))?;
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        ensure!(
            address.trim() == mac,
            "the macvtap {name} has the address {}, and the guest is to have {mac}: ip link set {name} address {mac}",
            address.trim()
        );
        let index = fs::read_to_string(interface.join("ifindex"))?;
        Ok(format!("/dev/tap{}", index.trim()).into())
    }

    fn open(&self) -> Result<Vec<OwnedFd>> {
        let name = &self.interface;
        let file = self.file()?;
        let open = |_| {
            let queue = open_device(
                &file,
                "CONFIG_TUN, or for a macvtap CONFIG_MACVTAP",
                OFlags::NONBLOCK,
            )?;
            let attached = tap::attach(queue.as_fd(), name, made::queues(self.queues > 1));
            match attached {
                Ok(()) => Ok(queue),
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => bail!(
                    "{name} is no tap with {} (queues = {})",
                    match self.queues {
                        1 => "one queue, as `ip tuntap add` makes it without multi_queue",
                        _ => "several queues, as `ip tuntap add … multi_queue` makes it",
                    },
                    self.queues
                ),
                Err(error) => Err(in_use(self.served, error, &format!("tap = {name}"))),
            }
        };
        (0..self.queues).map(open).collect()
    }
}
