//! The configuration space of a block device (virtio 1.3, 5.2.4).

use super::disk::{Disk, Erases, SECTOR};
use super::header::Erase;
use std::mem::offset_of;
use virtio_bindings::virtio_blk::virtio_blk_config;

/// Data segments in one request; with header and status that is a quarter of a queue.
const SEG_MAX: u32 = 126;

/// Segments of a discard or of zeroes.
const SEGMENTS: u32 = 1;

/// Where the driver reads and sets whether there is a write cache.
pub(super) const WRITE_BACK: usize = offset_of!(virtio_blk_config, wce);

/// The fields that the device's features make valid, but for [`WRITE_BACK`]; the others are zero.
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
    if let Some(topology) = disk.topology() {
        let blocks = |bytes: u32| bytes / disk.block_size();
        // A disk whose blocks are larger than what it writes at once writes a block.
        let exponent = blocks(topology.physical_block).checked_ilog2();
        let exponent = u8::try_from(exponent.unwrap_or(0)).expect("of 32 bits");
        let least = u16::try_from(blocks(topology.least)).unwrap_or(u16::MAX);
        for (offset, field) in [
            (
                offset_of!(virtio_blk_config, physical_block_exp),
                &[exponent][..],
            ),
            (
                offset_of!(virtio_blk_config, min_io_size),
                &least.to_le_bytes(),
            ),
            (
                offset_of!(virtio_blk_config, opt_io_size),
                &blocks(topology.best).to_le_bytes(),
            ),
        ] {
            put(offset, field);
        }
    }
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
