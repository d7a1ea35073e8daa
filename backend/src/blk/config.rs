//! The configuration space of a block device (virtio 1.3, 5.2.4).

use super::disk::{Disk, Erases, SECTOR};
use super::header::Erase;
use std::mem::offset_of;
use virtio_bindings::virtio_blk::virtio_blk_config;

/// Data segments in one request; with header and status that is a quarter of a queue.
const SEG_MAX: u32 = 126;

/// Segments of a discard or of zeroes.
const SEGMENTS: u32 = 1;

/// The fields that the device's features make valid; the others are zero.
pub(super) fn config_space(disk: &Disk, queues: u16) -> Vec<u8> {
    let Erases { discards, zeroes } = disk.erases();
    let bytes = match discards || zeroes {
        true => offset_of!(virtio_blk_config, write_zeroes_may_unmap) + 1,
        false => offset_of!(virtio_blk_config, max_discard_sectors),
    };
    let mut space = vec![0; bytes];
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
    if discards {
        let aligned = u64::from(disk.block_size()) / SECTOR;
        let aligned = u32::try_from(aligned).expect("sectors of a block");
        let most = Erase::Discard.most_sectors();
        for (offset, word) in [
            (offset_of!(virtio_blk_config, max_discard_sectors), most),
            (offset_of!(virtio_blk_config, max_discard_seg), SEGMENTS),
            (
                offset_of!(virtio_blk_config, discard_sector_alignment),
                aligned,
            ),
        ] {
            put(offset, &word.to_le_bytes());
        }
    }
    if zeroes {
        let sectors = offset_of!(virtio_blk_config, max_write_zeroes_sectors);
        put(sectors, &Erase::WriteZeroes.most_sectors().to_le_bytes());
        let segments = offset_of!(virtio_blk_config, max_write_zeroes_seg);
        put(segments, &SEGMENTS.to_le_bytes());
        let may_go = offset_of!(virtio_blk_config, write_zeroes_may_unmap);
        put(may_go, &[discards.into()]);
    }
    space
}
