//! Devices that a guest is given while it runs, in its empty slots, and that are taken from it.

use super::{Guest, WorkerContext};
use crate::ctl::control::AttachedAt;
use crate::ctl::xl_config::OwnLine;
use crate::toolstack::guest_file::FileDevice;
use crate::toolstack::libxl::{Entry, EntryForm, EntryKey};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use xen_virtio_backend::DeviceType;

impl Guest {
    /// Has the device of `line`, of which only its form was checked, in the empty slot known as `slot`, or in the first.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    pub(in crate::supervisor) fn attach(
        &mut self,
        slot: Option<&str>,
        line: OwnLine,
        context: &mut WorkerContext<'_>,
    ) -> Result<AttachedAt> {
        ensure!(
            line.device_type != DeviceType::NONE.0,
            "{} is no device: it is what a slot is before one is attached",
            line.kind
        );
        let (name, place) = self.empty_slot(slot, context)?;
        if let Some(grants) = line.says_grants() {
            let is = u8::from(place.grant_usage);
            ensure!(
                grants == place.grant_usage,
                "grant_usage is the slot's, which was made with grant_usage={is}: {name}"
            );
        }
        let device = FileDevice {
            device_type: line.device_type,
            base: place.base,
            interrupt: place.irq,
            grant_usage: place.grant_usage,
            settings: line.settings,
        };
        let key = context.toolstack.attach(&self.identity, &device)?;
        let base = place.base;
        Ok(AttachedAt { key, base })
    }

    /// The empty slot that is known as `wanted`, or the first.
    fn empty_slot(
        &self,
        wanted: Option<&str>,
        context: &mut WorkerContext<'_>,
    ) -> Result<(EntryKey, Entry)> {
        let wanted = wanted
            .map(|wanted| self.find(wanted, context))
            .transpose()?;
        let known = self.lifecycle.entries.iter();
        // Whether a worker has them now or gets them soon.
        let slots = known.filter(|(_, known)| known.is_slot());
        let slots: Vec<_> = slots.map(|(key, _)| *key).collect();
        if let Some(wanted) = wanted {
            ensure!(slots.contains(&wanted), "{wanted} is no empty slot");
        }
        let taken = self.taken(context)?;
        for key in &slots {
            let entry = context.toolstack.device(self.domid(), *key)?;
            if wanted.is_none_or(|wanted| wanted == *key) && !taken.contains(&entry.base) {
                return Ok((*key, entry));
            }
        }
        match (wanted, slots.len()) {
            (Some(wanted), _) => bail!("{wanted} has a device already"),
            (None, 0) => bail!(
                "it has no empty slot, and libxl gives a guest no device while it runs: for each that is to come, the xl file \
                 wants xen_virtio = [ \"empty\" ]"
            ),
            (None, slots) => {
                bail!("its {slots} empty slots have devices, or are just losing them: detach one")
            }
        }
    }

    /// The pages of devices that were attached, until nothing is left of them.
    fn taken(&self, context: &mut WorkerContext<'_>) -> Result<BTreeSet<u64>> {
        let domid = self.domid();
        let mut pages = BTreeSet::new();
        for (other, key) in context.toolstack.devices()? {
            let is_one = other == domid && key.form == EntryForm::Attached;
            if is_one && context.toolstack.state(domid, key)?.is_some() {
                pages.insert(context.toolstack.device(domid, key)?.base);
            }
        }
        Ok(pages)
    }

    /// Has the device known as `device` taken away, which was attached.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    pub(in crate::supervisor) fn detach(
        &mut self,
        device: &str,
        context: &mut WorkerContext<'_>,
    ) -> Result<EntryKey> {
        let key = self.find(device, context)?;
        let known = &self.lifecycle.entries[&key];
        if known.is_slot() {
            let entries = self.lifecycle.entries.iter();
            let mut others = entries.filter(|(other, _)| **other != key);
            match others.find(|(_, other)| other.base == known.base) {
                Some((other, _)) => bail!("{key} is a slot: {other} is the device in it"),
                None => bail!("{key} is a slot, and has no device"),
            }
        }
        match key.form {
            EntryForm::Attached => {}
            EntryForm::Disk => bail!("{key} is libxl's: xl block-detach takes it away"),
            EntryForm::Virtio | EntryForm::File => {
                bail!("{key} was not attached: its guest has it from its creation to its end")
            }
        }
        let detached = context.toolstack.detach(self.domid(), key);
        detached.with_context(|| key.to_string())?;
        Ok(key)
    }
}
