//! How a device is changed that runs, and what it is changed to.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a person has a device changed that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The guest is told of the size that its disk has now.
    Resize,
    /// The cable of its interface is plugged in, or out.
    Link { is_up: bool },
    /// Whoever orders it is attached to this port, by its number or name, and has read up to `from` of what the guest has written.
    Attach { port: String, from: Option<u64> },
    /// The guest sees these events of its input device: type, code and value of each.
    Input { events: Vec<[i32; 3]> },
}

/// What a device has that somebody can be attached to.
pub(super) const PORTS: &str = "ports";
/// What a device has by which somebody can inject events.
pub(super) const KEYS: &str = "keys";

impl Order {
    /// What a device has that can be changed so.
    pub(crate) fn part(&self) -> &'static str {
        match self {
            Self::Resize => "size",
            Self::Link { .. } => "link",
            Self::Attach { .. } => PORTS,
            Self::Input { .. } => KEYS,
        }
    }
}

/// What a device is changed to.
pub(crate) struct Changed {
    /// For whoever has ordered it.
    pub(crate) done: String,
    /// What is to be [kept](Opened::kept) from now on, if that is something else.
    pub(crate) kept: Option<Value>,
    /// For its [`Control`].
    pub(crate) change: Value,
}
