//! A port: what the guest writes to it, who reads that, and what they write to the guest.

use super::client::{Client, Gone, Input, MAX_MESSAGE, Output};
use super::counters::Counters;
use super::history::{History, Mark};
use super::state::Size;
use crate::engine::{Scratch, TransferError};
use crate::tuning::{CONSOLE_PIECE, CONSOLE_REQUESTS, CONSOLE_WRITE, FIRST_WAIT, MAX_COPIES};
use crate::virtqueue::{ActiveQueue, Request};
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// Clients that come and go, at once. As many again may listen no more, and have something for the guest still.
const MAX_VISITORS: usize = 8;

/// Bytes for one client at once: the guest's other devices wait meanwhile.
const SHARE: usize = 64 << 10;

/// Messages of one client at once that have no byte for the guest.
const MESSAGES: usize = 16;

pub(super) struct Port {
    /// A port with a name is a channel: what is written to it is for whoever is there, and none of it is lost. One without is a
    /// console: what is written to it waits for nobody.
    pub(super) name: Option<String>,
    pub(super) history: History,
    clients: Vec<(u32, Client)>,
    /// A request of which some was taken, and how much.
    held: Option<(Request, usize)>,
    /// What is on its way to the guest, and a buffer of the guest's that it goes to.
    input: Vec<u8>,
    held_buffer: Option<Request>,
    /// When a client may have more for which dom0 had no memory.
    pub(super) retry_at: Option<Instant>,
}

impl Port {
    pub(super) fn new(name: Option<String>, history: History) -> Self {
        Self {
            name,
            history,
            clients: Vec::new(),
            held: None,
            input: Vec::new(),
            held_buffer: None,
            retry_at: None,
        }
    }

    pub(super) fn is_channel(&self) -> bool {
        self.name.is_some()
    }

    /// Whether anyone is at the other end, for a driver.
    pub(super) fn is_attended(&self) -> bool {
        !self.is_channel() || self.attended().next().is_some()
    }

    fn visitors(&self) -> impl Iterator<Item = &(u32, Client)> {
        self.clients
            .iter()
            .filter(|(_, client)| client.is_visitor())
    }

    /// Whether one more may come.
    pub(super) fn has_room(&self) -> bool {
        let listening = self.visitors().filter(|(_, client)| client.listens());
        listening.count() < MAX_VISITORS
    }

    /// Who is to leave before one more comes, whatever it has said: of those who listen no more, the one that came first.
    pub(super) fn outstayed(&self) -> Option<u32> {
        let others = || self.visitors().filter(|(_, client)| !client.listens());
        let first = others().map(|(id, _)| *id).min();
        first.filter(|_| others().count() >= MAX_VISITORS)
    }

    pub(super) fn add(&mut self, id: u32, client: Client) {
        self.clients.push((id, client));
    }

    /// The client `id` is gone, if there is one.
    pub(super) fn remove(&mut self, id: u32) -> Option<Client> {
        let index = self.clients.iter().position(|(other, _)| *other == id)?;
        let (_, client) = self.clients.swap_remove(index);
        client.note(&self.history);
        Some(client)
    }

    /// Visitors whose other ends are closed.
    pub(super) fn ended(&self) -> Vec<u32> {
        let ended = self.visitors().filter(|(_, client)| client.has_ended());
        ended.map(|(id, _)| *id).collect()
    }

    /// Something has happened to the client `id`, see [`Client::ready`].
    ///
    /// # Errors
    ///
    /// [`Gone`].
    pub(super) fn ready(&mut self, id: u32, has_ended: bool) -> Result<(), Gone> {
        let is_channel = self.is_channel();
        match self.clients.iter_mut().find(|(other, _)| *other == id) {
            Some((_, client)) => client.ready(has_ended, &self.history, is_channel),
            None => Ok(()),
        }
    }

    /// Who is at the other end.
    fn attended(&self) -> impl Iterator<Item = &Client> {
        let clients = self.clients.iter().map(|(_, client)| client);
        clients.filter(|client| client.is_present() && !client.is_log())
    }

    /// How many bytes may be taken of the guest. What nobody has read of a console makes room for what is newer.
    pub(super) fn room(&self) -> usize {
        if !self.is_channel() {
            return CONSOLE_PIECE;
        }
        let behind = |client: &Client| self.history.end().saturating_sub(client.position);
        let listening = self.attended().filter(|client| client.listens());
        let behind = listening.map(behind).max();
        let behind = behind.map_or(History::KEPT, |bytes| {
            usize::try_from(bytes).unwrap_or(History::KEPT)
        });
        History::KEPT.saturating_sub(behind).min(CONSOLE_PIECE)
    }

    /// A request was taken, and is not done.
    pub(super) fn is_busy(&self) -> bool {
        self.held.is_some() || self.held_buffer.is_some()
    }

    /// The queue that the guest writes by is no more.
    pub(super) fn forget_output(&mut self) {
        self.held = None;
        self.history.forget_mark();
    }

    /// The queue that the guest reads by is no more, nor is who what is on its way was for.
    pub(super) fn forget_input(&mut self) {
        self.input.clear();
        self.held_buffer = None;
    }

    /// Takes what the guest has written. Whether it was anything.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn take_output(
        &mut self,
        queue: &mut ActiveQueue,
        scratch: &mut Scratch,
        counters: &mut Counters,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, TransferError> {
        let (mut taken, mut copies, mut has_taken) = (0, 0, false);
        for _ in 0..CONSOLE_REQUESTS {
            if taken >= CONSOLE_PIECE || copies >= MAX_COPIES || self.room() == 0 {
                break;
            }
            let (request, done) = match self.held.take() {
                Some(held) => held,
                None => match queue.pop()? {
                    Some(request) => (request, 0),
                    None => break,
                },
            };
            copies += request.readable.iter().count();
            let mark = Mark::after(queue.completed());
            let was_taken = request.is_repeated() && self.history.has(mark);
            let len = request.readable.len();
            let part = match was_taken {
                true => len,
                false => (len - done).min(self.room()),
            };
            let is_end = done + part == len;
            if !was_taken {
                let mark = if is_end { mark } else { Mark::NONE };
                match self.append(&request, done..done + part, mark, scratch, access) {
                    Ok(()) => counters.output_bytes += part as u64,
                    Err(fault) if fault.is_dom0s() => {
                        self.held = Some((request, done));
                        return Err(TransferError::Dom0(fault));
                    }
                    Err(_) => {
                        counters.malformed += 1;
                        has_taken = true;
                        queue.complete(request.finish(0))?;
                        continue;
                    }
                }
            }
            taken += part;
            has_taken = true;
            match is_end {
                true => {
                    counters.requests += 1;
                    queue.complete(request.finish(0))?;
                }
                false => self.held = Some((request, done + part)),
            }
        }
        Ok(has_taken)
    }

    /// Adds a part of a request, of [`CONSOLE_PIECE`] at most, to the history.
    fn append(
        &self,
        request: &Request,
        part: std::ops::Range<usize>,
        mark: Mark,
        scratch: &mut Scratch,
        access: &mut dyn GuestAccess,
    ) -> Result<(), CopyFault> {
        if part.len() <= Scratch::BYTES {
            let bytes = scratch.read_part(&request.readable, part.start, part.len(), access)?;
            self.history.append(bytes, mark);
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(part.len());
        while bytes.len() < part.len() {
            let (skip, rest) = (part.start + bytes.len(), part.len() - bytes.len());
            bytes.extend(scratch.read_part(&request.readable, skip, rest, access)?);
        }
        self.history.append(&bytes, mark);
        Ok(())
    }

    /// Gives those who read what they have not got yet: all of it, or what there is much of. Those who are gone, and whether
    /// there is more that can be given now.
    pub(super) fn flush(&mut self, all: bool, counters: &mut Counters) -> (Vec<u32>, bool) {
        let (mut gone, mut has_more) = (Vec::new(), false);
        self.retry_at = None;
        for (id, client) in &mut self.clients {
            let least = if all { 1 } else { CONSOLE_WRITE as u64 };
            match give(client, &self.history, least, counters) {
                Ok(Given::All | Given::Waits) => {}
                Ok(Given::Share) => has_more = true,
                Ok(Given::Lacking) => self.retry_at = Some(Instant::now() + FIRST_WAIT),
                Err(Gone) => gone.push(*id),
            }
        }
        (gone, has_more)
    }

    /// Whether there is something for the guest.
    pub(super) fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Whether a client has something for the guest that can be read now.
    pub(super) fn can_read(&self) -> bool {
        self.input.is_empty() && self.clients.iter().any(|(_, client)| client.can_read())
    }

    /// Reads what clients have for the guest, if nothing is on its way. Those who are gone, and what size a terminal has now.
    pub(super) fn read_input(&mut self) -> (Vec<u32>, Option<Size>) {
        let (mut gone, mut size) = (Vec::new(), None);
        let mut last = None;
        for (place, (id, client)) in self.clients.iter_mut().enumerate() {
            for _ in 0..MESSAGES {
                if !self.input.is_empty() || !client.can_read() {
                    break;
                }
                last = Some(place);
                let mut bytes = [0; MAX_MESSAGE];
                match client.read(&mut bytes) {
                    Ok(Input::Bytes(len)) => self.input.extend(&bytes[..len]),
                    Ok(Input::Size(new)) => size = Some(new),
                    Ok(Input::Nothing) => {}
                    Err(Gone) => {
                        gone.push(*id);
                        break;
                    }
                }
            }
        }
        // Who has had its turn is the last to have the next one.
        if let Some(place) = last {
            self.clients.rotate_left(place + 1);
        }
        (gone, size)
    }

    /// Gives the guest what is on its way. Whether it was anything.
    ///
    /// # Errors
    ///
    /// [`TransferError`].
    pub(super) fn give_input(
        &mut self,
        queue: &mut ActiveQueue,
        scratch: &mut Scratch,
        counters: &mut Counters,
        access: &mut dyn GuestAccess,
    ) -> Result<bool, TransferError> {
        let mut given = false;
        for _ in 0..CONSOLE_REQUESTS {
            if self.input.is_empty() {
                break;
            }
            let request = match self.held_buffer.take() {
                Some(held) => held,
                None => match queue.pop()? {
                    Some(request) => request,
                    None => break,
                },
            };
            let written = match scratch.write(&self.input, &request.writable, access) {
                Ok(written) => written,
                Err(fault) if fault.is_dom0s() => {
                    self.held_buffer = Some(request);
                    return Err(TransferError::Dom0(fault));
                }
                Err(_) => {
                    counters.malformed += 1;
                    0
                }
            };
            self.input.drain(..written);
            counters.input_bytes += written as u64;
            counters.requests += 1;
            queue.complete(request.finish(written))?;
            given = true;
        }
        Ok(given)
    }
}

/// Why a client has no more for now.
enum Given {
    /// There is no more, or too little for now.
    All,
    /// It has room for no more.
    Waits,
    /// It has had its share of this step.
    Share,
    /// dom0 has no memory for more.
    Lacking,
}

/// Gives a client what it has not got yet, if that is `least` bytes or more.
fn give(
    client: &mut Client,
    history: &History,
    least: u64,
    counters: &mut Counters,
) -> Result<Given, Gone> {
    let (begin, end) = (history.begin(), history.end());
    let mut given = 0;
    while client.can_write() {
        let output = if !client.is_greeted() {
            client.greet()?
        } else if client.position + least > end {
            return Ok(Given::All);
        } else if given >= SHARE {
            return Ok(Given::Share);
        } else {
            if client.position < begin {
                counters.missed(client.is_log(), begin - client.position);
                if client.counts() {
                    client.end_writing();
                    return Ok(Given::Waits);
                }
                client.position = begin;
            }
            let mut bytes = [0; CONSOLE_WRITE];
            client.write(history.read(client.position, &mut bytes))?
        };
        match output {
            Output::Taken(written) => given += written,
            Output::Full => {}
            Output::Lacking => return Ok(Given::Lacking),
        }
        client.note(history);
    }
    Ok(Given::Waits)
}
