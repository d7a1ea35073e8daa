//! What `xen-virtioctl` asks, and what it is answered.

use super::guest::{Guest, WorkerContext};
use super::{REPORT_LIMIT, Supervisor};
use crate::ctl::control::AttachedAt;
use crate::ctl::report::{Report, which};
use crate::ctl::xl_config::OwnLine;
use crate::devices::Order;
use mio::Token;
use serde::Serialize;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// Reports on their way from the workers to clients.
pub(super) struct Collection {
    pub(super) waiting: BTreeSet<Token>,
    pub(super) deadline: Instant,
    clients: Vec<Token>,
}

impl Supervisor {
    /// Has a device of a guest changed, and `client` told of how that went.
    pub(super) fn change(
        &mut self,
        client: Token,
        guest: &str,
        device: Option<&str>,
        order: Order,
        descriptor: Option<OwnedFd>,
    ) {
        let is_attaching = matches!(order, Order::Attach { .. });
        let result = self.with_guest(guest, |guest, named, context| {
            let (key, done) = guest.change(device, order, descriptor, context)?;
            let device = device.map_or_else(|| key.to_string(), str::to_owned);
            Ok(format!("{named}, {device}: {done}"))
        });
        match &result {
            // Whoever waits for a console asks again and again.
            _ if is_attaching => {}
            Ok(done) => tracing::info!("{done}"),
            Err(error) => tracing::warn!("not changed: {error}"),
        }
        self.answer(client, &result);
    }

    /// Gives a guest the device of `line` in one of its empty slots, and tells `client` where.
    pub(super) fn attach(&mut self, client: Token, guest: &str, slot: Option<&str>, line: &str) {
        let result = OwnLine::parse(line).and_then(|line| {
            self.with_guest(guest, |guest, _, context| guest.attach(slot, line, context))
        });
        match &result {
            Ok(AttachedAt { key, .. }) => tracing::info!(guest, device = %key, "is to be attached"),
            Err(error) => tracing::warn!("not attached: {error}"),
        }
        self.answer(client, &result);
    }

    /// Takes a device from a guest that was attached, and tells `client` that this has begun.
    pub(super) fn detach(&mut self, client: Token, guest: &str, device: &str) {
        let result = self.with_guest(guest, |guest, _, context| guest.detach(device, context));
        match &result {
            Ok(key) => tracing::info!(guest, device = %key, "is to be taken away"),
            Err(error) => tracing::warn!("not detached: {error}"),
        }
        self.answer(client, &result);
    }

    /// Has the requests of a device told of by the pipe `descriptor`, and tells `client` which device that is.
    pub(super) fn trace(
        &mut self,
        client: Token,
        guest: &str,
        device: &str,
        goes_on: bool,
        descriptor: Option<OwnedFd>,
    ) {
        // Whoever goes on asks again and again: nothing is logged.
        let result = self.with_guest(guest, |guest, named, context| {
            let traced = guest.trace(device, goes_on, descriptor, context)?;
            Ok(format!("{named}, {traced}"))
        });
        self.answer(client, &result);
    }

    /// What `ask` gets of the guest known as `guest`, of which it is told how it is called in messages.
    fn with_guest<T>(
        &mut self,
        guest: &str,
        ask: impl FnOnce(&mut Guest, &str, &mut WorkerContext<'_>) -> anyhow::Result<T>,
    ) -> Result<T, String> {
        let (guests, mut context) = self.parts();
        let names = guests.iter().map(|(domid, other)| (*domid, other.name()));
        let domid = which(names, guest)?;
        let found = guests.get_mut(&domid).expect("it was found");
        let named = format!("guest {} ({domid})", found.name());
        let result = ask(found, &named, &mut context);
        result.map_err(|error| format!("{named}: {error:#}"))
    }

    fn answer(&mut self, client: Token, answer: &impl Serialize) {
        let answer = serde_json::to_vec(answer).expect("it has no map with odd keys");
        self.clients.answer(client, answer, self.poll.registry());
    }

    /// Asks all workers for their reports, for `client`.
    pub(super) fn collect(&mut self, client: Token) {
        if let Some(collection) = &mut self.collection {
            collection.clients.push(client);
            return;
        }
        let guests = self.guests.values_mut();
        let asked = guests.filter_map(|guest| {
            guest.forget_report();
            guest.ask_report()
        });
        let waiting = asked.collect();
        let deadline = Instant::now() + REPORT_LIMIT;
        self.collection = Some(Collection {
            waiting,
            deadline,
            clients: vec![client],
        });
    }

    pub(super) fn answer_clients(&mut self) {
        let Some(collection) = self.collection.take() else {
            return;
        };
        let report = Report {
            guests: self.guests.values_mut().map(Guest::report).collect(),
            refusals: self.refusals.iter().cloned().collect(),
        };
        let answer = serde_json::to_vec(&report).expect("it has no map with odd keys");
        for client in collection.clients {
            self.clients
                .answer(client, answer.clone(), self.poll.registry());
        }
    }
}
