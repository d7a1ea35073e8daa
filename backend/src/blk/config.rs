//! The configuration space of a block device (virtio 1.3, 5.2.4).

use super::disk::{Disk, SECTOR};
use std::mem::offset_of;
use virtio_bindings::virtio_blk::virtio_blk_config;

/// Data segments in one request; with header and status that is a quarter of a queue.
const SEG_MAX: u32 = 126;

/// The fields that the device's features make valid; the others are zero.
pub(super) fn config_space(disk: &Disk, queues: u16) -> Vec<u8> {
    let mut space = vec![0; offset_of!(virtio_blk_config, max_discard_sectors)];
    let mut put =
        |offset: usize, field: &[u8]| space[offset..offset + field.len()].copy_from_slice(field);
    put(
        offset_of!(virtio_blk_config, capacity),
        &(disk.bytes() / SECTOR).to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, seg_max),
        &SEG_MAX.to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, blk_size),
        &disk.block_size().to_le_bytes(),
    );
    put(
        offset_of!(virtio_blk_config, num_queues),
        &queues.to_le_bytes(),
    );
    space
}
