//! What `xen-virtioctl` asks, and what it is answered.

use super::guest::Guest;
use super::{REPORT_LIMIT, Supervisor};
use crate::ctl::report::Report;
use crate::devices::Order;
use mio::Token;
use std::collections::BTreeSet;
use std::time::Instant;

/// Reports on their way from the workers to clients.
pub(super) struct Collection {
    pub(super) waiting: BTreeSet<Token>,
    pub(super) deadline: Instant,
    clients: Vec<Token>,
}

impl Supervisor {
    /// Has a device of a guest changed, and `client` told of how that went.
    pub(super) fn change(&mut self, client: Token, guest: &str, device: &str, order: Order) {
        let (guests, mut context) = self.parts();
        // A name may be a number, and the guest may have chosen it (init-dom0less): a domid goes first.
        let of_number = guest
            .parse()
            .ok()
            .filter(|domid| guests.contains_key(domid));
        let of_name: Vec<_> = guests
            .iter()
            .filter(|(_, other)| other.name() == guest)
            .map(|(domid, _)| *domid)
            .collect();
        let found = match (of_number, &of_name[..]) {
            (Some(domid), _) => Ok(domid),
            (None, [domid]) => Ok(*domid),
            (None, []) => Err(format!("there is no guest {guest} with a virtio device")),
            (None, several) => Err(format!(
                "the guests {several:?} are all named {guest}: give the number of one"
            )),
        };
        let result = found.and_then(|domid| {
            let found = guests.get_mut(&domid).expect("it was found");
            let named = format!("guest {} ({domid})", found.name());
            match found.change(device, order, &mut context) {
                Ok(done) => Ok(format!("{named}, {device}: {done}")),
                Err(error) => Err(format!("{named}: {error:#}")),
            }
        });
        match &result {
            Ok(done) => tracing::info!("{done}"),
            Err(error) => tracing::warn!("not changed: {error}"),
        }
        let answer = serde_json::to_vec(&result).expect("a text can be written");
        self.clients.answer(client, answer, self.poll.registry());
    }

    /// Asks all workers for their reports, for `client`.
    pub(super) fn collect(&mut self, client: Token) {
        if let Some(collection) = &mut self.collection {
            collection.clients.push(client);
            return;
        }
        let waiting = self
            .guests
            .values_mut()
            .filter_map(Guest::ask_report)
            .collect();
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
        let answer = serde_json::to_vec(&report).expect("a report has no map with odd keys");
        for client in collection.clients {
            self.clients
                .answer(client, answer.clone(), self.poll.registry());
        }
    }
}
