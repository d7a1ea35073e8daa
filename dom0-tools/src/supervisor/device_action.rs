//! What is to be done when the toolstack tells of a device: by what it says, and what we have.

use crate::toolstack::EntryState;

/// What we have of a device's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ours {
    NoGuest,
    /// Its guest, which does not have the device.
    Guest,
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceAction {
    Nothing,
    /// The device is the guest's from now on.
    Begin,
    /// The toolstack was told that the device is served, and we have no record of it.
    Unrecorded,
    /// The device is taken from the guest, and the toolstack told when that is done.
    Close,
    /// Nobody serves the device: the toolstack is told so at once.
    TellClosed,
    /// The device is taken from the guest; nobody waits for that.
    Withdraw,
}

impl DeviceAction {
    /// For a device of which the toolstack says `state`; `None` if it is gone.
    pub(super) fn of(state: Option<EntryState>, ours: Ours) -> Self {
        match (state, ours) {
            (None, Ours::NoGuest) | (Some(EntryState::Closed), _) => Self::Nothing,
            (None, Ours::Guest | Ours::Device) => Self::Withdraw,
            (Some(EntryState::Closing), Ours::NoGuest) => Self::TellClosed,
            (Some(EntryState::Closing), Ours::Guest | Ours::Device) => Self::Close,
            (Some(EntryState::New | EntryState::Served), Ours::Device) => Self::Nothing,
            (Some(EntryState::New), Ours::NoGuest | Ours::Guest) => Self::Begin,
            (Some(EntryState::Served), Ours::NoGuest | Ours::Guest) => Self::Unrecorded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::Identity;

    #[test]
    fn what_is_done_follows_from_both_sides() {
        use DeviceAction::{Begin, Close, Nothing, TellClosed, Unrecorded, Withdraw};
        let ours = [Ours::NoGuest, Ours::Guest, Ours::Device];
        for (state, actions) in [
            (None, [Nothing, Withdraw, Withdraw]),
            (Some(EntryState::New), [Begin, Begin, Nothing]),
            (Some(EntryState::Served), [Unrecorded, Unrecorded, Nothing]),
            (Some(EntryState::Closing), [TellClosed, Close, Close]),
            (Some(EntryState::Closed), [Nothing, Nothing, Nothing]),
        ] {
            for (ours, expected) in ours.into_iter().zip(actions) {
                let action = DeviceAction::of(state, ours);
                assert_eq!(action, expected, "{state:?}, {ours:?}");
            }
        }
    }

    /// A domid that comes round again is another guest's, which begins with the device.
    #[test]
    fn a_guest_is_followed_by_another_of_its_domid() {
        let guest = |vm: Option<&str>| Identity {
            domid: 3,
            vm: vm.map(str::to_owned),
        };
        let a = guest(Some("/vm/a"));
        for (before, now, expected) in [
            (&a, &a, false),
            // Its nodes go before it does.
            (&a, &guest(None), false),
            (&a, &guest(Some("/vm/b")), true),
            // A guest of which nobody has said which it is.
            (&guest(None), &a, true),
            (&guest(None), &guest(None), false),
        ] {
            assert_eq!(before.is_followed_by(now), expected, "{before:?}, {now:?}");
            let ours = match expected {
                true => Ours::NoGuest,
                false => Ours::Device,
            };
            let action = DeviceAction::of(Some(EntryState::New), ours);
            assert_eq!(action == DeviceAction::Begin, expected);
        }
    }
}
