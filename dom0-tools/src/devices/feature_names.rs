//! Feature bits of device types, by their names (virtio 1.3, 5).

use virtio_bindings::virtio_ids as ids;
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_F_CHANGE, VIRTIO_SCSI_F_HOTPLUG, VIRTIO_SCSI_F_INOUT, VIRTIO_SCSI_F_T10_PI,
};

const NET: &[(u32, &str)] = &[
    (net::VIRTIO_NET_F_CSUM, "CSUM"),
    (net::VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
    (net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, "CTRL_GUEST_OFFLOADS"),
    (net::VIRTIO_NET_F_MTU, "MTU"),
    (net::VIRTIO_NET_F_MAC, "MAC"),
    (net::VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
    (net::VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
    (net::VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
    (net::VIRTIO_NET_F_GUEST_UFO, "GUEST_UFO"),
    (net::VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
    (net::VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
    (net::VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    (net::VIRTIO_NET_F_HOST_UFO, "HOST_UFO"),
    (net::VIRTIO_NET_F_MRG_RXBUF, "MRG_RXBUF"),
    (net::VIRTIO_NET_F_STATUS, "STATUS"),
    (net::VIRTIO_NET_F_CTRL_VQ, "CTRL_VQ"),
    (net::VIRTIO_NET_F_CTRL_RX, "CTRL_RX"),
    (net::VIRTIO_NET_F_CTRL_VLAN, "CTRL_VLAN"),
    (net::VIRTIO_NET_F_GUEST_ANNOUNCE, "GUEST_ANNOUNCE"),
    (net::VIRTIO_NET_F_MQ, "MQ"),
    (net::VIRTIO_NET_F_CTRL_RX_EXTRA, "CTRL_RX_EXTRA"),
    (net::VIRTIO_NET_F_CTRL_MAC_ADDR, "CTRL_MAC_ADDR"),
    (net::VIRTIO_NET_F_VQ_NOTF_COAL, "VQ_NOTF_COAL"),
    (net::VIRTIO_NET_F_NOTF_COAL, "NOTF_COAL"),
    (net::VIRTIO_NET_F_GUEST_USO4, "GUEST_USO4"),
    (net::VIRTIO_NET_F_GUEST_USO6, "GUEST_USO6"),
    (net::VIRTIO_NET_F_HOST_USO, "HOST_USO"),
    (net::VIRTIO_NET_F_SPEED_DUPLEX, "SPEED_DUPLEX"),
];
const SCSI: &[(u32, &str)] = &[
    (VIRTIO_SCSI_F_INOUT, "INOUT"),
    (VIRTIO_SCSI_F_HOTPLUG, "HOTPLUG"),
    (VIRTIO_SCSI_F_CHANGE, "CHANGE"),
    (VIRTIO_SCSI_F_T10_PI, "T10_PI"),
];
// The crate has no constants of these types.
const VSOCK: &[(u32, &str)] = &[(0, "STREAM"), (1, "SEQPACKET"), (2, "NO_IMPLIED_STREAM")];
const FS: &[(u32, &str)] = &[(0, "NOTIFICATION")];
const SCMI: &[(u32, &str)] = &[(0, "P2A_CHANNELS"), (1, "SHARED_MEMORY")];
const I2C: &[(u32, &str)] = &[(0, "ZERO_LENGTH_REQUEST")];
const GPIO: &[(u32, &str)] = &[(0, "IRQ")];
const SOUND: &[(u32, &str)] = &[(0, "CTLS")];
const CONSOLE: &[(u32, &str)] = &[(0, "SIZE"), (1, "MULTIPORT"), (2, "EMERG_WRITE")];

/// Of the virtio device type `device_type`.
pub(super) fn of(device_type: u32) -> &'static [(u32, &'static str)] {
    match device_type {
        ids::VIRTIO_ID_NET => NET,
        ids::VIRTIO_ID_SCSI => SCSI,
        ids::VIRTIO_ID_VSOCK => VSOCK,
        ids::VIRTIO_ID_FS => FS,
        ids::VIRTIO_ID_SCMI => SCMI,
        ids::VIRTIO_ID_I2C_ADAPTER => I2C,
        ids::VIRTIO_ID_GPIO => GPIO,
        ids::VIRTIO_ID_SOUND => SOUND,
        ids::VIRTIO_ID_CONSOLE => CONSOLE,
        _ => &[],
    }
}
