//! Devices that vhost-user back-ends serve: programs of others, each at a socket.

pub(super) mod image;
mod offer_record;
mod settings;

use super::{
    Arriving, BackEnd, Building, Built, Busy, Control, DeviceKind, Inherited, NewDevice, Opened,
    RegionSize, Resources, SyscallRule, Wanted, blk, feature_names, parse_settings, spec,
};
use crate::devices::blk::Uses;
use crate::guest_state::{self, DeviceRecords};
use anyhow::{Context, Result, bail};
use offer_record::{Kept, decoded, encoded};
use serde::{Deserialize, Serialize};
use serde_json::Value;
pub(crate) use settings::MAX_SHARED;
use settings::Settings;
pub(super) use settings::parse_mac;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;
use virtio_bindings::virtio_ids as ids;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU};
use xen_virtio_backend::DeviceType;
use xen_virtio_backend::vhost_user::{
    Arrival, Brought, CLASSES, Class, Frontend, Link, MAX_QUEUES, Offer, SessionError, Setup,
};

/// Bytes of a file system's tag (virtio 1.3, 5.11.4), behind which is the number of its request queues.
const TAG_BYTES: usize = 36;
/// The place of the largest packet's size in a network device's configuration space (virtio 1.3, 5.1.4).
const MTU_PLACE: usize = 10;

/// A type of device that back-ends serve.
pub(super) struct VhostUserKind {
    name: &'static str,
    class: &'static Class,
    driver_option: &'static str,
    /// KiB for the data of its requests without a setting: a few of the largest that its driver sends.
    pool_kib: u32,
}

const fn class(device_type: u32) -> &'static Class {
    let mut index = 0;
    while CLASSES[index].device_type.0 != device_type {
        index += 1;
    }
    &CLASSES[index]
}

const fn kind(
    name: &'static str,
    device_type: u32,
    driver_option: &'static str,
    pool_kib: u32,
) -> VhostUserKind {
    VhostUserKind {
        name,
        class: class(device_type),
        driver_option,
        pool_kib,
    }
}

pub(super) const KINDS: &[VhostUserKind] = &[
    kind("net", ids::VIRTIO_ID_NET, "CONFIG_VIRTIO_NET", 4096),
    kind("blk", ids::VIRTIO_ID_BLOCK, "CONFIG_VIRTIO_BLK", 8192),
    kind("rng", ids::VIRTIO_ID_RNG, "CONFIG_HW_RANDOM_VIRTIO", 256),
    kind("input", ids::VIRTIO_ID_INPUT, "CONFIG_VIRTIO_INPUT", 256),
    kind("scsi", ids::VIRTIO_ID_SCSI, "CONFIG_SCSI_VIRTIO", 4096),
    kind(
        "vsock",
        ids::VIRTIO_ID_VSOCK,
        "CONFIG_VIRTIO_VSOCKETS",
        8192,
    ),
    kind("sound", ids::VIRTIO_ID_SOUND, "CONFIG_SND_VIRTIO", 4096),
    kind("fs", ids::VIRTIO_ID_FS, "CONFIG_VIRTIO_FS", 8192),
    kind(
        "scmi",
        ids::VIRTIO_ID_SCMI,
        "CONFIG_ARM_SCMI_TRANSPORT_VIRTIO",
        256,
    ),
    kind("i2c", ids::VIRTIO_ID_I2C_ADAPTER, "CONFIG_I2C_VIRTIO", 1024),
    kind("gpio", ids::VIRTIO_ID_GPIO, "CONFIG_GPIO_VIRTIO", 1024),
];

/// What a worker is told of a device. The connection to its back-end and the memory for it go beside, if there is one; and the
/// memory that an earlier worker has shared by it, if the connection is that one's.
#[derive(Serialize, Deserialize)]
struct Spec {
    settings: Settings,
    /// What its back-ends had in an earlier life of its guest's, if there is none now.
    offer: Option<Vec<u8>>,
}

/// What is known of a device, for the next life of its guest's.
#[derive(Serialize, Deserialize)]
struct Known {
    settings: Settings,
    /// What its back-ends have.
    offer: Vec<u8>,
}

impl Known {
    /// What the back-ends of a device had that was this one.
    fn offer(known: Option<Value>, settings: &Settings) -> Option<Vec<u8>> {
        let known: Self = serde_json::from_value(known?).ok()?;
        (known.settings == *settings).then_some(known.offer)
    }
}

impl DeviceKind for VhostUserKind {
    fn device_type(&self) -> DeviceType {
        self.class.device_type
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn feature_names(&self) -> &'static [(u32, &'static str)] {
        match self.class.device_type {
            DeviceType::BLOCK => blk::BlkKind.feature_names(),
            DeviceType(other) => feature_names::of(other),
        }
    }

    fn needs(&self) -> Option<&'static str> {
        Some("socket = where its back-end listens")
    }

    fn warnings(&self, settings: &toml::Table) -> Vec<String> {
        let settings = parse_settings::<Settings>(settings);
        settings.map_or_else(|_| Vec::new(), |settings| settings.warnings())
    }

    fn driver_option(&self) -> Option<&'static str> {
        Some(self.driver_option)
    }

    fn check_settings(&self, settings: &toml::Table) -> Result<()> {
        let has_format = settings.contains_key(image::FORMAT);
        if has_format && self.device_type() != DeviceType::BLOCK {
            bail!("a device of type {} has no {}", self.name, image::FORMAT);
        }
        parse_settings::<Settings>(settings)?.check(self).map(drop)
    }

    fn state_bytes(&self, _spec: &Value) -> usize {
        let queues = [self.class.queue_size; MAX_QUEUES as usize];
        guest_state::device_bytes(&Kept::bytes(self.class), &queues)
    }

    fn open(&self, wanted: &Wanted<'_>, _uses: &mut Uses) -> Result<Opened> {
        let kept = wanted.kept.clone().map(serde_json::from_value::<Settings>);
        let settings = match kept.transpose()? {
            Some(settings) => settings,
            None => wanted
                .settings::<Settings>()?
                .context("nothing says where its back-end is")?
                .check(self)?,
        };
        let program = settings.program(wanted)?;
        if let Some(program) = &program {
            program.keep_running()?;
        }
        let known = Known::offer(wanted.known.clone(), &settings);
        let (socket, left) = match &wanted.inherited {
            Some(Inherited { socket, left }) => {
                (Some(socket.try_clone()?), Some(left.try_clone()?))
            }
            None => {
                let may_wait = wanted.served || known.is_some();
                (settings.connect(program.is_some(), may_wait)?, None)
            }
        };
        let region = RegionSize {
            queue_size: settings.queue_size(self),
            pool: settings.pool_kib(self) as usize * 1024,
        };
        let brought = socket.map(|socket| region.brought(socket)).transpose()?;
        let mut descriptors = Vec::new();
        if let Some(brought) = &brought {
            let Brought { socket, memory } = brought.try_clone()?;
            descriptors.extend([socket, memory]);
        }
        if let Some(left) = &left {
            descriptors.push(left.try_clone()?);
        }
        let opened = Opened::new(
            format!("{} by {}", self.name, settings.socket.display()),
            spec(&Spec {
                settings: settings.clone(),
                offer: known.filter(|_| brought.is_none()),
            }),
        );
        Ok(Opened {
            descriptors,
            back_end: Some(BackEnd {
                socket: settings.socket.clone(),
                brought,
                left,
                region,
                program,
            }),
            kept: Some(spec(&settings)),
            ..opened
        })
    }

    fn build(&self, new: NewDevice<'_>, _resources: &Resources<'_>) -> Result<Building> {
        let Spec { settings, offer } = serde_json::from_value(new.spec)?;
        let mut descriptors = new.descriptors.into_iter();
        let brought = brought(&mut descriptors);
        let setup = Template {
            kind: self.name,
            class: self.class,
            queue_size: settings.queue_size(self),
            pool: settings.pool_kib(self) as usize * 1024,
            settings,
        };
        let kept = Kept::new(new.records, self.class)?;
        if let Some(offer) = kept.offer()?.or_else(|| decoded(&offer?, self.class)) {
            let known = setup.known(&offer);
            let (mut device, link) = setup.device(&offer, kept)?;
            match (brought, descriptors.next()) {
                (Some(brought), Some(left)) => device.inherit(brought, left),
                (Some(brought), None) => link.put(brought),
                (None, _) => {}
            }
            return Ok(built(device, link, known).into());
        }
        let brought = brought.context("no connection came with the device")?;
        let arrival = Arrival::new(brought, self.class).map_err(of_back_end)?;
        Ok(Building::Arriving(Box::new(Arriver { arrival, setup })))
    }

    fn syscalls(&self) -> Vec<SyscallRule> {
        let unix = u64::try_from(libc::AF_UNIX).expect("a small number");
        let any = [
            libc::SYS_ftruncate,
            libc::SYS_fallocate,
            libc::SYS_fcntl,
            libc::SYS_recvfrom,
            libc::SYS_eventfd2,
        ];
        let sealable = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        let with = |call, argument| SyscallRule {
            call,
            argument: Some(argument),
        };
        let rules = any.into_iter().map(|call| SyscallRule {
            call,
            argument: None,
        });
        let inline = u64::try_from(libc::SO_OOBINLINE).expect("a small number");
        rules
            .chain([
                with(libc::SYS_setsockopt, (2, vec![inline])),
                with(libc::SYS_memfd_create, (1, vec![sealable])),
                with(libc::SYS_socketpair, (0, vec![unix])),
                // To the other end of a pair, and to nobody by name.
                with(libc::SYS_sendto, (5, vec![0])),
            ])
            .collect()
    }
}

/// A device but for what its back-end has.
struct Template {
    kind: &'static str,
    class: &'static Class,
    queue_size: u16,
    pool: usize,
    settings: Settings,
}

impl Template {
    fn known(&self, offer: &Offer) -> Value {
        spec(&Known {
            settings: self.settings.clone(),
            offer: encoded(offer),
        })
    }

    fn device(&self, offer: &Offer, mut kept: Kept) -> Result<(Frontend, Link)> {
        let (mut config, mut features) = (Vec::new(), 0);
        if self.kind == "fs" {
            match &self.settings.tag {
                Some(tag) => {
                    let mut bytes = tag.clone().into_bytes();
                    bytes.resize(TAG_BYTES, 0);
                    config.push((0, bytes));
                }
                None if offer.config.is_empty() => {
                    bail!(
                        "its back-end does not say under which name its guest mounts it: set tag = \"…\""
                    )
                }
                None => {}
            }
            if offer.config.is_empty() {
                // The first queue is not for requests.
                let queues = u32::from(offer.queues).saturating_sub(1);
                config.push((TAG_BYTES, queues.to_le_bytes().to_vec()));
            }
        }
        if let Some(mac) = &self.settings.mac {
            config.push((0, parse_mac(mac)?.to_vec()));
            features |= 1 << VIRTIO_NET_F_MAC;
        }
        if let Some(mtu) = self.settings.mtu {
            config.push((MTU_PLACE, mtu.to_le_bytes().to_vec()));
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let setup = Setup {
            class: self.class,
            queue_size: self.queue_size,
            pool: self.pool,
            config,
            features,
        };
        let link = Link::default();
        kept.store(offer);
        let lasting = kept.lasting()?;
        let device = Frontend::new(setup, offer, link.clone(), lasting)?;
        Ok((device, link))
    }
}

fn built(device: Frontend, link: Link, known: Value) -> Built {
    Built {
        device: Box::new(device),
        control: Some(Box::new(LinkControl { link })),
        known: Some(known),
    }
}

/// What became of a back-end: somebody may start another one, unless this one is none.
fn of_back_end(error: SessionError) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    let why = format!("its back-end is of no use: {error:#}");
    Busy(why).into()
}

/// A device whose back-end is asked what it has.
struct Arriver {
    arrival: Arrival,
    setup: Template,
}

impl Arriving for Arriver {
    fn readable(&self) -> BorrowedFd<'_> {
        self.arrival.as_fd()
    }

    fn due(&self) -> Option<Instant> {
        self.arrival.due()
    }

    fn step(&mut self) -> Result<bool> {
        let offer = self.arrival.step().map_err(of_back_end)?;
        Ok(offer.is_some())
    }

    fn finish(mut self: Box<Self>, records: &DeviceRecords<'_>) -> Result<Built> {
        let offer = self.arrival.step().map_err(of_back_end)?;
        let offer = offer
            .context("the back-end has not said what it has")?
            .clone();
        let kept = Kept::new(records, self.setup.class)?;
        let known = self.setup.known(&offer);
        let (device, link) = self.setup.device(&offer, kept)?;
        Ok(built(device.with(self.arrival)?, link, known))
    }
}

/// The connection that came, with the memory for it.
fn brought(descriptors: &mut impl Iterator<Item = OwnedFd>) -> Option<Brought> {
    Some(Brought {
        socket: descriptors.next()?,
        memory: descriptors.next()?,
    })
}

/// Brings a device its back-ends.
struct LinkControl {
    link: Link,
}

impl Control for LinkControl {
    fn change(&self, _change: &Value, descriptors: Vec<OwnedFd>) -> Result<()> {
        let brought = brought(&mut descriptors.into_iter());
        self.link.put(brought.context("no connection came")?);
        Ok(())
    }

    fn shared(&self) -> Option<u64> {
        self.link.take_shared()
    }
}
