//! State that outlives the process, so that the next one goes on where this one was killed.
//!
//! A process can die between any two instructions. What it has stored by then stays, in program order; so every update
//! here becomes true by the store of one word.

mod area;
mod cell;
mod records;

pub(crate) use area::WORD;
pub use area::{StateArea, StateMemory};
pub use cell::{StateCell, StateError};
pub use records::{RecordError, RecordKey, RecordKind, Records};
