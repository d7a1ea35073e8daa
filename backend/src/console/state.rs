//! What device and driver have told each other of the ports: the next process must know it.

use std::ops::{BitOr, BitOrAssign};

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

impl Size {
    pub(super) const BYTES: usize = 4;

    /// Columns and rows, as the specification has them in messages (virtio 1.3, 5.3.6.2).
    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let [[a, b], [c, d]] = [self.columns, self.rows].map(u16::to_le_bytes);
        [a, b, c, d]
    }

    pub(super) fn from_bytes([a, b, c, d]: [u8; Self::BYTES]) -> Self {
        Self {
            columns: u16::from_le_bytes([a, b]),
            rows: u16::from_le_bytes([c, d]),
        }
    }
}

impl Default for Size {
    /// That of a terminal of which nothing is known.
    fn default() -> Self {
        Self {
            columns: 80,
            rows: 24,
        }
    }
}

/// Flags of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags(u8);

impl Flags {
    /// The driver has set the port up.
    pub(super) const READY: Self = Self(1);
    /// Somebody in the guest has it open.
    pub(super) const OPEN: Self = Self(1 << 1);
    /// The driver is to be told that there is the port;
    pub(super) const TELL_ADDED: Self = Self(1 << 2);
    /// … that it is a console;
    pub(super) const TELL_CONSOLE: Self = Self(1 << 3);
    /// … its name;
    pub(super) const TELL_NAME: Self = Self(1 << 4);
    /// … whether anyone is at its other end;
    pub(super) const TELL_OPEN: Self = Self(1 << 5);
    /// … its size.
    pub(super) const TELL_SIZE: Self = Self(1 << 6);

    const ALL: u8 = (1 << 7) - 1;

    pub(super) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(super) fn clear(&mut self, flag: Self) {
        self.0 &= !flag.0;
    }

    pub(super) fn set_to(&mut self, flag: Self, is_set: bool) {
        match is_set {
            true => *self |= flag,
            false => self.clear(flag),
        }
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// What is known of one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PortState {
    pub(super) flags: Flags,
    pub(super) size: Size,
}

impl PortState {
    /// Bytes of it where it is kept.
    pub(super) const BYTES: usize = 1 + Size::BYTES;

    fn write(self) -> [u8; Self::BYTES] {
        let [a, b, c, d] = self.size.to_bytes();
        [self.flags.0, a, b, c, d]
    }

    fn read([flags, size @ ..]: [u8; Self::BYTES]) -> Option<Self> {
        (flags & !Flags::ALL == 0).then_some(Self {
            flags: Flags(flags),
            size: Size::from_bytes(size),
        })
    }
}

/// `ports`, as bytes.
pub(super) fn write(ports: &[PortState]) -> Vec<u8> {
    ports.iter().flat_map(|port| port.write()).collect()
}

/// What [`write`] has made of `count` ports; that of new ones, of nothing. `None` if it is damaged.
pub(super) fn read(bytes: &[u8], count: usize) -> Option<Vec<PortState>> {
    if bytes.is_empty() {
        return Some(vec![PortState::default(); count]);
    }
    let (ports, rest) = bytes.as_chunks();
    let ports: Option<Vec<_>> = ports.iter().map(|port| PortState::read(*port)).collect();
    ports.filter(|ports| ports.len() == count && rest.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_and_what_is_damaged_is_refused() {
        let mut ports = vec![PortState::default(); 3];
        ports[1].flags |= Flags::READY | Flags::TELL_SIZE;
        ports[2].size = Size {
            columns: 0x1234,
            rows: 0xfedc,
        };
        let mut bytes = write(&ports);
        assert_eq!(read(&bytes, 3).unwrap(), ports);
        assert_eq!(read(&[], 2).unwrap(), [PortState::default(); 2]);
        assert_eq!(read(&bytes, 2), None);
        assert_eq!(read(&bytes[1..], 3), None);
        bytes[5] = 0x80;
        assert_eq!(read(&bytes, 3), None);
    }
}
