//! What of a device outlives the process that serves it.

use super::register_file::SavedRegisters;
use crate::virtio_state::RestoreError;
use std::io;
use xen_virtio_backend::{MAX_QUEUE_SIZE, QueueJournal, StateArea, StateCell, StateError};

/// Bytes of registers as they are written, but for the queues, and for each queue: the widest numbers.
const REGISTERS: usize = 256;
const QUEUE_REGISTERS: usize = 160;
/// Queues of a state that ends with its process.
const PRIVATE_QUEUES: usize = 16;

/// A device's registers and queues, as the next process will find them. A clone is the same state.
#[derive(Clone)]
pub struct DeviceState {
    registers: StateCell,
    journals: Vec<StateArea>,
}

/// Why a device cannot go on from what an earlier process left.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    #[error("what is recorded of the device cannot be read")]
    Damaged(#[from] StateError),
    #[error("what is recorded of the device cannot be understood")]
    Format(#[from] serde_json::Error),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("there is room for the state of {room} queues, and the device has {queues}")]
    Queues { room: usize, queues: usize },
}

impl DeviceState {
    /// The state in `registers`, with room for [`DeviceState::registers_bytes`], and the `journals` of the queues, each of
    /// [`QueueJournal::bytes`]; zeros are that of a device that nobody has driven.
    pub fn new(registers: StateCell, journals: Vec<StateArea>) -> Self {
        Self {
            registers,
            journals,
        }
    }

    /// Bytes that the registers of a device with so many queues take.
    pub const fn registers_bytes(queues: usize) -> usize {
        REGISTERS + queues * QUEUE_REGISTERS
    }

    /// State that ends with this process.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn private() -> io::Result<Self> {
        let registers = StateCell::bytes(Self::registers_bytes(PRIVATE_QUEUES));
        let journal = || StateArea::private(QueueJournal::bytes(MAX_QUEUE_SIZE));
        let journals: io::Result<_> = (0..PRIVATE_QUEUES).map(|_| journal()).collect();
        Ok(Self::new(
            StateCell::new(StateArea::private(registers)?),
            journals?,
        ))
    }

    /// Forgets the device, for another one.
    pub fn clear(&self) {
        self.registers.clear();
    }

    pub(crate) fn journals(&self) -> Vec<StateArea> {
        self.journals.clone()
    }

    /// What was saved last, if anything was.
    pub(crate) fn load(&self, queues: usize) -> Result<Option<SavedRegisters>, DeviceStateError> {
        let room = self.journals.len();
        if queues > room {
            return Err(DeviceStateError::Queues { room, queues });
        }
        let bytes = self.registers.load()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    pub(crate) fn save(&self, registers: &SavedRegisters) {
        let bytes = serde_json::to_vec(registers).expect("numbers and lists of numbers");
        self.registers
            .store(&bytes)
            .expect("room for the most queues");
    }
}

#[cfg(test)]
mod tests {
    use super::super::register_file::tests::widest_registers;
    use super::*;

    /// As the first version wrote them, which every later one reads.
    const FIRST_FORMAT: &str = r#"{"status":15,"device_features_sel":1,"driver_features_sel":1,
        "driver_features":13421773376,"driver_features_beyond":false,"queue_sel":0,"queues":[{"size":512,
        "ready":true,"descriptors":9223372036854808576,"available":9223372036854816768,
        "used":9223372036854820864}],"config_generation":0}"#;

    #[test]
    fn registers_of_the_first_format_are_understood() {
        let state = DeviceState::private().unwrap();
        state.registers.store(FIRST_FORMAT.as_bytes()).unwrap();
        let registers = state.load(1).unwrap().unwrap();
        let written = serde_json::to_value(&registers).unwrap();
        let first: serde_json::Value = serde_json::from_str(FIRST_FORMAT).unwrap();
        for (name, value) in first.as_object().unwrap() {
            assert_eq!(written[name], *value, "{name}");
        }
    }

    #[test]
    fn the_widest_registers_fit() {
        for queues in [0, 1, PRIVATE_QUEUES] {
            let bytes = StateCell::bytes(DeviceState::registers_bytes(queues));
            let journal = || StateArea::private(QueueJournal::bytes(8)).unwrap();
            let state = DeviceState::new(
                StateCell::new(StateArea::private(bytes).unwrap()),
                (0..queues).map(|_| journal()).collect(),
            );
            let registers = widest_registers(queues);
            state.save(&registers);
            assert_eq!(state.load(queues).unwrap(), Some(registers));
            assert!(state.load(queues + 1).is_err());
        }
    }
}
