//! The control queue (virtio 1.3, 5.1.6.5): what the driver sets is kept, and followed from the next step on.

use super::command::{Command, Moderated};
use super::frame::low;
use super::{Net, Role};
use crate::device::DeviceError;
use crate::tuning::SIMPLE_BATCH;
use crate::virtqueue::Request;
use virtio_bindings::virtio_net as ids;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

impl Net {
    /// Carries out what is in the control queue. True if there was anything.
    pub(super) fn control(&mut self, access: &mut dyn GuestAccess) -> Result<bool, DeviceError> {
        let index = (0..self.queues.count()).find(|index| self.role(*index) == Role::Controls);
        let Some(index) = index else { return Ok(false) };
        for done in 0..SIMPLE_BATCH {
            let Some(queue) = self.queues.get(index) else {
                return Ok(done > 0);
            };
            let request = match self.held.take() {
                Some(held) => Some(held),
                None => queue.pop()?,
            };
            let Some(request) = request else {
                return Ok(done > 0);
            };
            match self.carry_out(&request, access) {
                Ok(written) => {
                    let queue = self.queues.get(index).expect("it was there");
                    queue.complete(request.finish(written))?;
                }
                Err(fault) => {
                    self.held = Some(request);
                    self.lack = Some(fault);
                    return Ok(done > 0);
                }
            }
        }
        Ok(true)
    }

    /// Carries out a command. How many bytes of its answer were written.
    ///
    /// # Errors
    ///
    /// A fault that is dom0's: nothing has come of the command.
    fn carry_out(
        &mut self,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, CopyFault> {
        let command = match self.control.read(&request.readable, access) {
            Ok(bytes) => Command::read(bytes, self.features),
            Err(fault) if fault.is_dom0s() => return Err(fault),
            Err(_) => None,
        };
        let command = command.filter(|command| self.concerns_running_queues(command));
        if let Some(Command::Moderate(..)) = command {
            // What waits by the last rule is told, not held by it.
            for interrupts in &mut self.interrupts {
                interrupts.hasten();
            }
        }
        let mut controls = self.controls.clone();
        let applied = command.map(|command| controls.apply(command));
        let answer = match applied {
            Some(Ok(answer)) => {
                if controls != self.controls {
                    self.controls = controls;
                    self.keep_controls();
                    for pair in &mut self.pairs {
                        pair.receiver.look();
                    }
                }
                let mut bytes = vec![low(ids::VIRTIO_NET_OK)];
                bytes.extend(answer.into_iter().flat_map(|of| of.bytes()));
                bytes
            }
            Some(Err(_)) | None => {
                self.counters.refused_commands += 1;
                vec![low(ids::VIRTIO_NET_ERR)]
            }
        };
        self.counters.commands += 1;
        match self.control.write(&answer, &request.writable, access) {
            Err(fault) if fault.is_dom0s() => Err(fault),
            // A driver that takes no answer gets none.
            written => Ok(written.unwrap_or(0)),
        }
    }

    /// Whether a command that names a queue names one that carries frames now (5.1.6.5.7.2).
    fn concerns_running_queues(&mut self, command: &Command) -> bool {
        let (Command::Moderate(Moderated::One(queue), _) | Command::AskModeration(queue)) = command
        else {
            return true;
        };
        let queue = usize::from(*queue);
        let pairs = usize::from(self.controls.pairs);
        match self.role(queue) {
            Role::Receives(pair) | Role::Sends(pair) => {
                pair < pairs && self.queues.get(queue).is_some()
            }
            Role::Controls | Role::Nothing => false,
        }
    }
}
