//! What is known of a type of device without its back-end: vhost-user has no message for it.

use super::selections::Selections;
use crate::device::DeviceType;
use crate::shadow::{Answer, Loss, Rules};
use std::ops::Range;
use virtio_bindings::virtio_ids as ids;
use virtio_bindings::virtio_net;

/// A type of device that back-ends serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    pub device_type: DeviceType,
    /// The largest size of its queues that its back-ends take.
    pub queue_size: u16,
    /// Queues of a back-end that does not say how many it has.
    pub queues: u16,
    /// Bytes of its configuration space (virtio 1.3, section 5).
    pub config_bytes: usize,
    pub rules: Rules,
    /// Feature bits of the type that need somebody between driver and back-end who knows them.
    pub without_features: u64,
    /// Its back-ends are told of everything, whether they would be or not: some loop for ever over what they only look at.
    pub without_event_idx: bool,
    /// The bytes of its configuration space that the driver may write.
    pub writable: Range<usize>,
    /// … by which it selects what it reads in the others (virtio 1.3, 5.8.4).
    pub selects: bool,
}

/// The most bytes that are known of any configuration space.
pub const MAX_CONFIG: usize = Selections::MAX_BYTES;
/// The most queues that a back-end may have.
pub const MAX_QUEUES: u16 = 16;

const fn class(
    device_type: u32,
    queue_size: u16,
    queues: u16,
    config_bytes: usize,
    loss: &'static [Loss],
) -> Class {
    Class {
        device_type: DeviceType(device_type),
        queue_size,
        queues,
        config_bytes,
        rules: Rules {
            loss,
            overstate: false,
            alike: false,
        },
        without_features: 0,
        without_event_idx: false,
        writable: 0..0,
        selects: false,
    }
}

const REPEATED: &[Loss] = &[Loss::Repeat];
/// Of a disk.
const COMMANDS: Rules = Rules {
    loss: REPEATED,
    overstate: false,
    alike: true,
};
const UNANSWERED: &[Loss] = &[Loss::Fail(Answer::Nothing)];

/// Every type that is served.
pub const CLASSES: &[Class] = &[
    // A frame that is sent twice, or never, is what networks do. Control commands are the frontend's to carry out: there is
    // no message for most of them.
    Class {
        without_features: 1 << virtio_net::VIRTIO_NET_F_CTRL_VQ
            | 1 << virtio_net::VIRTIO_NET_F_CTRL_RX
            | 1 << virtio_net::VIRTIO_NET_F_CTRL_VLAN
            | 1 << virtio_net::VIRTIO_NET_F_CTRL_RX_EXTRA
            | 1 << virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE
            | 1 << virtio_net::VIRTIO_NET_F_MQ
            | 1 << virtio_net::VIRTIO_NET_F_CTRL_MAC_ADDR
            | 1 << virtio_net::VIRTIO_NET_F_VQ_NOTF_COAL
            | 1 << virtio_net::VIRTIO_NET_F_NOTF_COAL
            | 1 << virtio_net::VIRTIO_NET_F_HASH_REPORT
            | 1 << virtio_net::VIRTIO_NET_F_RSS,
        ..class(ids::VIRTIO_ID_NET, 1024, 2, 12, REPEATED)
    },
    // `writeback` (virtio 1.3, 5.2.4).
    Class {
        writable: 32..33,
        rules: COMMANDS,
        ..class(ids::VIRTIO_ID_BLOCK, 1024, 1, 60, REPEATED)
    },
    class(ids::VIRTIO_ID_RNG, 1024, 1, 0, REPEATED),
    // The second queue sets lights and sounds.
    Class {
        writable: 0..2,
        selects: true,
        ..class(
            ids::VIRTIO_ID_INPUT,
            1024,
            2,
            136,
            &[Loss::Repeat, Loss::Fail(Answer::Nothing)],
        )
    },
    // Commands of a disk can be carried out twice.
    Class {
        rules: COMMANDS,
        ..class(ids::VIRTIO_ID_SCSI, 128, 3, 36, REPEATED)
    },
    // The connections are gone with the back-end, as VIRTIO_VSOCK_EVENT_TRANSPORT_RESET says in the last queue.
    // Linux before 5.16 counts what it has read among what it has written (drivers/vhost/vsock.c).
    Class {
        rules: Rules {
            loss: &[
                Loss::Fail(Answer::Nothing),
                Loss::Fail(Answer::Nothing),
                Loss::Tell(Answer::FirstWord(0)),
            ],
            overstate: true,
            alike: false,
        },
        ..class(ids::VIRTIO_ID_VSOCK, 1024, 3, 8, UNANSWERED)
    },
    // VIRTIO_SND_S_IO_ERR. The last queue's requests have their status behind the data. vhost-device-sound 0.3.0 loops over its
    // queue of events while there are buffers in it.
    Class {
        without_event_idx: true,
        ..class(
            ids::VIRTIO_ID_SOUND,
            64,
            4,
            12,
            &[
                Loss::Fail(Answer::FirstWord(0x8003)),
                Loss::Repeat,
                Loss::Fail(Answer::FirstWord(0x8003)),
                Loss::Fail(Answer::LastWords(0x8003)),
            ],
        )
    },
    class(ids::VIRTIO_ID_FS, 1024, 2, 40, &[Loss::Fail(Answer::Fuse)]),
    class(ids::VIRTIO_ID_SCMI, 1024, 2, 0, UNANSWERED),
    // VIRTIO_I2C_MSG_ERR. vhost-device-i2c 0.1.0 counts what it has read among what it has written.
    Class {
        rules: Rules {
            loss: &[Loss::Fail(Answer::LastByte(1))],
            overstate: true,
            alike: false,
        },
        ..class(ids::VIRTIO_ID_I2C_ADAPTER, 1024, 1, 0, UNANSWERED)
    },
    // VIRTIO_GPIO_STATUS_ERR. The second queue's requests wait for interrupts.
    class(
        ids::VIRTIO_ID_GPIO,
        256,
        2,
        8,
        &[Loss::Fail(Answer::FirstWord(1)), Loss::Repeat],
    ),
];

impl Class {
    /// The most bytes that are known of its configuration space.
    pub const fn known_bytes(&self) -> usize {
        match self.selects {
            true => MAX_CONFIG,
            false => self.config_bytes,
        }
    }

    /// The class of a device type.
    pub fn of(device_type: DeviceType) -> Option<&'static Self> {
        CLASSES
            .iter()
            .find(|class| class.device_type == device_type)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_QUEUE_SIZE;

    #[test]
    fn classes_are_ones_that_can_be_served() {
        for class in CLASSES {
            assert!(class.queue_size.is_power_of_two() && class.queue_size <= MAX_QUEUE_SIZE);
            assert!(class.config_bytes <= MAX_CONFIG && (1..=MAX_QUEUES).contains(&class.queues));
            assert!(!class.rules.loss.is_empty());
            assert_eq!(Class::of(class.device_type), Some(class));
        }
    }
}
