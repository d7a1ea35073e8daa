//! Messages of the control queues (virtio 1.3, 5.3.6.2): `le32 id`, `le16 event`, `le16 value`, and what some have behind.

use super::state::Size;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

const HEADER: usize = 8;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It can use the device, or not.
    DeviceReady(bool),
    PortReady {
        port: usize,
        is_ready: bool,
    },
    /// Somebody in the guest has opened the port, or has closed it.
    PortOpen {
        port: usize,
        is_open: bool,
    },
}

impl FromDriver {
    /// The message in `bytes`, of a device with `ports` ports. `None` if a driver does not send it.
    pub(super) fn read(bytes: &[u8], ports: usize) -> Option<Self> {
        let (header, _) = bytes.split_first_chunk::<HEADER>()?;
        let [a, b, c, d, event @ .., x, y] = *header;
        let port = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok();
        let port = port.filter(|port| *port < ports);
        let value = u16::from_le_bytes([x, y]) != 0;
        match u16::from_le_bytes(event) {
            DEVICE_READY => Some(Self::DeviceReady(value)),
            PORT_READY => Some(Self::PortReady {
                port: port?,
                is_ready: value,
            }),
            PORT_OPEN => Some(Self::PortOpen {
                port: port?,
                is_open: value,
            }),
            _ => None,
        }
    }
}

/// What a driver is told of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToDriver<'a> {
    Added,
    IsConsole,
    Named(&'a str),
    /// Whether anyone is at its other end.
    Open(bool),
    Size(Size),
}

impl ToDriver<'_> {
    /// The message that says so of `port`.
    pub(super) fn write(self, port: u32) -> Vec<u8> {
        let (event, value) = match self {
            Self::Added => (DEVICE_ADD, 1),
            Self::IsConsole => (CONSOLE_PORT, 1),
            Self::Named(_) => (PORT_NAME, 1),
            Self::Open(is_open) => (PORT_OPEN, u16::from(is_open)),
            Self::Size(_) => (RESIZE, 1),
        };
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        match self {
            Self::Named(name) => bytes.extend(name.bytes()),
            Self::Size(size) => bytes.extend(size.to_bytes()),
            Self::Added | Self::IsConsole | Self::Open(_) => {}
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_says_what_drivers_say_of_ports_that_there_are() {
        let message = |port: u32, event: u16, value: u16| {
            let mut bytes = port.to_le_bytes().to_vec();
            bytes.extend(event.to_le_bytes());
            bytes.extend(value.to_le_bytes());
            bytes
        };
        let read = |port, event, value| FromDriver::read(&message(port, event, value), 2);
        assert_eq!(read(u32::MAX, 0, 1), Some(FromDriver::DeviceReady(true)));
        let port = 1;
        let (is_ready, is_open) = (true, false);
        assert_eq!(
            read(1, 3, 1),
            Some(FromDriver::PortReady { port, is_ready })
        );
        assert_eq!(read(1, 6, 0), Some(FromDriver::PortOpen { port, is_open }));
        for (port, event) in [(2, 3), (u32::MAX, 6), (0, 1), (0, 7), (0, u16::MAX)] {
            assert_eq!(read(port, event, 1), None, "{port} {event}");
        }
        assert_eq!(FromDriver::read(&message(0, 0, 1)[..7], 2), None);
        let mut long = message(0, 0, 0);
        long.push(9);
        assert_eq!(
            FromDriver::read(&long, 2),
            Some(FromDriver::DeviceReady(false))
        );
    }

    #[test]
    fn a_driver_is_told_in_the_order_of_the_specification() {
        let size = Size {
            columns: 0x0102,
            rows: 3,
        };
        assert_eq!(
            ToDriver::Size(size).write(1),
            [1, 0, 0, 0, 5, 0, 1, 0, 2, 1, 3, 0]
        );
        assert_eq!(ToDriver::Named("a").write(0), *b"\0\0\0\0\x07\0\x01\0a");
        assert_eq!(ToDriver::Open(false).write(0), [0, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(ToDriver::Added.write(0x0100_0000), [0, 0, 0, 1, 1, 0, 1, 0]);
        assert_eq!(ToDriver::IsConsole.write(0), [0, 0, 0, 0, 4, 0, 1, 0]);
    }
}
