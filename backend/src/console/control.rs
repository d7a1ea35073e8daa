//! The control queues (virtio 1.3, 5.3.6.2): device and driver tell each other of ports.

use super::message::{FromDriver, ToDriver};
use super::state::Flags;
use super::{Console, Role};
use crate::engine::TransferError;
use crate::tuning::SIMPLE_BATCH;
use xen_virtio_guest_mapping::GuestAccess;

/// What a driver is told of a port, in this order.
const TELL: [Flags; 5] = [
    Flags::TELL_ADDED,
    Flags::TELL_CONSOLE,
    Flags::TELL_NAME,
    Flags::TELL_OPEN,
    Flags::TELL_SIZE,
];

impl Console {
    /// Takes what the driver says. Whether it was anything.
    pub(super) fn hear(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        for done in 0..SIMPLE_BATCH {
            let Some(queue) = self.queues.get(Role::Hears.queue()) else {
                return Ok(done > 0);
            };
            let request = match self.heard.take() {
                Some(held) => Some(held),
                None => queue.pop()?,
            };
            let Some(request) = request else {
                return Ok(done > 0);
            };
            let message = match self.scratch.read(&request.readable, access) {
                Ok(bytes) => FromDriver::read(bytes, self.ports.len()),
                Err(fault) if fault.is_dom0s() => {
                    self.heard = Some(request);
                    return Err(TransferError::Dom0(fault));
                }
                Err(_) => None,
            };
            // Before the driver has it back: it may say so no more.
            match message {
                Some(message) => self.follow(message),
                None => self.counters.malformed += 1,
            }
            self.counters.requests += 1;
            let queue = self.queues.get(Role::Hears.queue()).expect("it was there");
            queue.complete(request.finish(0))?;
        }
        Ok(true)
    }

    fn follow(&mut self, message: FromDriver) {
        match message {
            FromDriver::DeviceReady(false) => self.counters.malformed += 1,
            FromDriver::DeviceReady(true) => {
                for port in &mut self.state {
                    port.flags |= Flags::TELL_ADDED;
                }
            }
            FromDriver::PortReady { port, is_ready } => {
                let is_channel = self.ports[port].is_channel();
                let flags = &mut self.state[port].flags;
                flags.set_to(Flags::READY, is_ready);
                flags.set_to(Flags::TELL_CONSOLE, is_ready && !is_channel);
                flags.set_to(Flags::TELL_NAME, is_ready && is_channel);
                flags.set_to(Flags::TELL_OPEN, is_ready);
                flags.set_to(Flags::TELL_SIZE, is_ready && !is_channel);
            }
            FromDriver::PortOpen { port, is_open } => {
                self.state[port].flags.set_to(Flags::OPEN, is_open);
            }
        }
        self.keep_state();
    }

    /// Tells the driver what it is to know. Whether it was anything.
    pub(super) fn tell(&mut self, access: &mut dyn GuestAccess) -> Result<bool, TransferError> {
        let mut told = false;
        while let Some((port, flag)) = self.next_to_tell() {
            let Some(queue) = self.queues.get(Role::Tells.queue()) else {
                return Ok(told);
            };
            let request = match self.told.take() {
                Some(held) => Some(held),
                None => queue.pop()?,
            };
            let Some(request) = request else {
                return Ok(told);
            };
            let of_port = &self.ports[port];
            let message = match (flag, &of_port.name) {
                (Flags::TELL_ADDED, _) => ToDriver::Added,
                (Flags::TELL_NAME, Some(name)) => ToDriver::Named(name),
                (Flags::TELL_OPEN, _) => ToDriver::Open(of_port.is_attended()),
                (Flags::TELL_SIZE, _) => ToDriver::Size(self.state[port].size),
                _ => ToDriver::IsConsole,
            };
            let id = u32::try_from(port).expect("few ports");
            let message = message.write(id);
            let written = match self.scratch.write(&message, &request.writable, access) {
                Err(fault) if fault.is_dom0s() => {
                    self.told = Some(request);
                    return Err(TransferError::Dom0(fault));
                }
                written => written.unwrap_or(0),
            };
            // A buffer that is too small for it: the driver gets it back, and the message by the next one.
            let is_whole = written == message.len();
            let written = if is_whole { written } else { 0 };
            let queue = self.queues.get(Role::Tells.queue()).expect("it was there");
            queue.complete(request.finish(written))?;
            self.counters.requests += 1;
            match is_whole {
                true => {
                    self.state[port].flags.clear(flag);
                    self.keep_state();
                }
                false => self.counters.malformed += 1,
            }
            told = true;
        }
        Ok(told)
    }

    /// What the driver is told next, and of which port.
    pub(super) fn next_to_tell(&self) -> Option<(usize, Flags)> {
        let ports = self.state.iter().enumerate();
        let mut waiting = ports.flat_map(|(port, state)| {
            let flags = TELL.into_iter().filter(|flag| state.flags.has(*flag));
            flags.map(move |flag| (port, flag))
        });
        waiting.next()
    }
}
