//! What of a device outlives the process that serves it.

use crate::register_file::{RestoreError, SavedRegisters};
use std::io;
use xen_virtio_backend::{QueueIndex, QueueJournal, StateArea, StateCell, StateError};

/// Bytes for the registers, twice: those of four queues take less than 1 KiB.
const REGISTERS: usize = 4 << 10;
/// Bytes for one queue's journal.
const QUEUE: usize = QueueJournal::BYTES.next_multiple_of(4096);
/// Queues that there is room for.
const QUEUES: usize = 4;

/// A device's registers and queues, as the next process will find them.
pub struct DeviceState {
    registers: StateCell,
    queues: StateArea,
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
    #[error("a device has at most {QUEUES} queues, and this one {0}")]
    Queues(usize),
}

impl DeviceState {
    /// Bytes that the state of any device takes.
    pub const BYTES: usize = REGISTERS + QUEUES * QUEUE;

    /// The state in `area`, of [`DeviceState::BYTES`]; zeros are that of a device that nobody has driven.
    pub fn new(area: &StateArea) -> Self {
        Self {
            registers: StateCell::new(area.part(0, REGISTERS)),
            queues: area.part(REGISTERS, QUEUES * QUEUE),
        }
    }

    /// State that ends with this process.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn private() -> io::Result<Self> {
        Ok(Self::new(&StateArea::private(Self::BYTES)?))
    }

    /// Forgets the device, for another one.
    pub fn clear(&self) {
        self.registers.clear();
    }

    pub(crate) fn journal(&self, index: QueueIndex) -> QueueJournal {
        QueueJournal::new(self.queues.part(index.get() * QUEUE, QUEUE))
    }

    /// What was saved last, if anything was.
    pub(crate) fn load(&self, queues: usize) -> Result<Option<SavedRegisters>, DeviceStateError> {
        if queues > QUEUES {
            return Err(DeviceStateError::Queues(queues));
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
    use super::*;
    use crate::register_file::tests::widest_registers;

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
        let state = DeviceState::private().unwrap();
        let registers = widest_registers(QUEUES);
        state.save(&registers);
        assert_eq!(state.load(QUEUES).unwrap(), Some(registers));
        assert!(state.load(QUEUES + 1).is_err());
    }
}
