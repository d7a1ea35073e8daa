//! A device of ours at a vhost-user socket, for any VMM.

use crate::config::Config;
use crate::connections::listen;
use crate::ctl::xl_config::OwnLine;
use crate::devices::blk::Uses;
use crate::devices::{self, Building, NewDevice, Resources, Service, Wanted};
use crate::guest_state::{GuestState, Name};
use crate::toolstack::Identity;
use crate::toolstack::libxl::{EntryForm, EntryKey, EntryKind};
use anyhow::{Result, anyhow, bail};
use rustix::fs::Mode;
use std::path::Path;
use xen_virtio_backend::{DeviceType, RingStock, StateArea};
use xen_virtio_transport::vhost_user_server;

/// Queues of a device that has one for each vCPU: nobody says how many there are.
const VCPUS: usize = 8;

const KEY: EntryKey = EntryKey {
    form: EntryForm::File,
    devid: 0,
};

/// Serves the device that `line` describes, as a line of `xen_virtio = [ … ]` does, to whoever connects to `socket`.
///
/// # Errors
///
/// What keeps it from being served.
pub fn run(socket: &Path, line: &str, config: &Config) -> Result<()> {
    let line = OwnLine::parse(line).map_err(|error| anyhow!(error))?;
    if Service::of(&line.settings) != Service::Own {
        let own = devices::kinds(Service::Own);
        let own = own.filter(|kind| kind.device_type() != DeviceType::NONE);
        let own = own.map(devices::DeviceKind::name);
        bail!(
            "{} with these settings is another one's to serve: what is served here is {}",
            line.kind,
            own.collect::<Vec<_>>().join(", ")
        );
    }
    let kind = devices::kind(line.device_type, Service::Own)?;
    let guest = Identity {
        domid: 0,
        vm: Some(format!("vhost-user:{}", socket.display())),
    };
    let source = EntryKind::Virtio {
        device_type: line.device_type,
        settings: Some(line.settings),
    };
    let wanted = Wanted {
        guest: &guest,
        name: "vhost-user",
        key: KEY,
        source: &source,
        config,
        created: None,
        served: false,
        kept: None,
        known: None,
        inherited: None,
    };
    let opened = kind.open(&wanted, &mut Uses::default())?;
    // Nothing goes on from what is kept here.
    let bytes = crate::guest_state::file_bytes(1).max(kind.state_bytes(&opened.spec));
    let state = GuestState::new(StateArea::private(bytes)?, bytes)?;
    let name = Name {
        key: KEY,
        base: 0,
        backing: opened.backing,
        device_type: line.device_type,
    };
    let rings = RingStock::new(1);
    let records = state.device(&name, false)?;
    let new = NewDevice {
        key: KEY,
        served: false,
        spec: opened.spec,
        descriptors: opened.descriptors,
        records: &records,
    };
    let resources = Resources {
        rings: &rings,
        vcpus: VCPUS,
        begun: true,
        has_leaving: false,
        channel: None,
    };
    let Building::Ready(built) = kind.build(new, &resources)? else {
        bail!("{}: it waits for somebody else", line.kind);
    };
    let listener = listen(socket, Mode::from_raw_mode(0o777))?;
    tracing::info!("{}: at {}", opened.detail, socket.display());
    Ok(vhost_user_server::serve(built.device, &listener)?)
}
