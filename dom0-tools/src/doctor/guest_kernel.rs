//! What the kernel of a guest can do, as far as its image tells.

use flate2::read::GzDecoder;
use memchr::memmem::find;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// An image, unpacked, as far as it is read.
const MAX_IMAGE: u64 = 128 << 20;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Where the image of an arm64 Linux has its magic number and its flags (Linux, Documentation/arch/arm64/booting.rst).
const MAGIC_AT: usize = 56;
const MAGIC: [u8; 4] = *b"ARM\x64";
const FLAGS_AT: usize = 24;

/// Names that Linux matches devices of a device tree by: its drivers have them in their tables.
const MMIO_DRIVER: &[u8] = b"virtio,mmio\0";
const GRANT_DRIVER: &[u8] = b"xen,grant-dma\0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GuestKernel {
    /// KiB, if it says so.
    pub(super) page_kib: Option<u32>,
    /// Built in: a module's is in another file.
    pub(super) has_mmio_driver: bool,
    /// `CONFIG_XEN_VIRTIO`, which cannot be a module.
    pub(super) can_grant: bool,
}

impl GuestKernel {
    /// The kernel in the image at `path`; none if that is no arm64 Linux, plain or packed by gzip.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn read(path: &Path) -> io::Result<Option<Self>> {
        // Opening a pipe would wait for somebody who writes it.
        if !path.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut file = File::open(path)?;
        let mut image = Vec::new();
        let begin = GZIP_MAGIC.len() as u64;
        file.by_ref().take(begin).read_to_end(&mut image)?;
        if image == GZIP_MAGIC {
            let packed = image.as_slice().chain(file);
            let mut unpacked = Vec::new();
            GzDecoder::new(packed)
                .take(MAX_IMAGE)
                .read_to_end(&mut unpacked)?;
            image = unpacked;
        } else {
            file.take(MAX_IMAGE).read_to_end(&mut image)?;
        }
        Ok(Self::of(&image))
    }

    fn of(image: &[u8]) -> Option<Self> {
        let is_linux = image.get(MAGIC_AT..)?.starts_with(&MAGIC);
        let flags = *image.get(FLAGS_AT)?;
        is_linux.then(|| Self {
            page_kib: match flags >> 1 & 0b11 {
                1 => Some(4),
                2 => Some(16),
                3 => Some(64),
                _ => None,
            },
            has_mmio_driver: find(image, MMIO_DRIVER).is_some(),
            can_grant: find(image, GRANT_DRIVER).is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn image(flags: u8, names: &[&[u8]]) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[FLAGS_AT] = flags;
        image[MAGIC_AT..][..4].copy_from_slice(&MAGIC);
        image.extend(names.concat());
        image
    }

    #[test]
    fn an_image_tells_its_pages_and_its_drivers() {
        for (flags, page_kib) in [(0, None), (0xa, Some(4)), (0xc, Some(16)), (0xe, Some(64))] {
            let kernel = GuestKernel::of(&image(flags, &[])).unwrap();
            assert_eq!(kernel.page_kib, page_kib, "{flags}");
            assert!(!kernel.has_mmio_driver && !kernel.can_grant);
        }
        let kernel = GuestKernel::of(&image(0, &[b"xxen,", MMIO_DRIVER, GRANT_DRIVER])).unwrap();
        assert!(kernel.has_mmio_driver && kernel.can_grant);
        for other in [&b"MZ"[..], &[0; 100], &[]] {
            assert_eq!(GuestKernel::of(other), None);
        }
    }

    #[test]
    fn a_packed_image_is_unpacked() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(&image(0xa, &[MMIO_DRIVER])).unwrap();
        file.write_all(&packer.finish().unwrap()).unwrap();
        let kernel = GuestKernel::read(file.path()).unwrap().unwrap();
        assert!(kernel.has_mmio_driver && !kernel.can_grant);
        assert_eq!(kernel.page_kib, Some(4));
        file.as_file().set_len(20).unwrap();
        assert!(GuestKernel::read(file.path()).is_err());
        // Nor is anything read that is no file: of a pipe that would wait for ever.
        assert!(GuestKernel::read(Path::new("/dev/null")).is_err());
    }
}
