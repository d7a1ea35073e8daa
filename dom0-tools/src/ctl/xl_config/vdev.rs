//! The numbers of the devices that xl names (xen-vbd-interface(7)).

use super::c_number::{Radix, c_number};

/// The number of a device: `xvda`, `xvdb1`, `sda`, `hda`, `d0p1`, or a number. `None` for what xl knows no
/// device by.
pub(super) fn number(vdev: &str) -> Option<u32> {
    let xen = numbered(vdev).or_else(|| lettered(vdev, "xvd", (1 << 20) - 1, 255));
    if let Some((disk, partition)) = xen {
        return Some(if disk < 16 && partition < 16 {
            202 << 8 | disk << 4 | partition
        } else {
            1 << 28 | disk << 8 | partition
        });
    }
    if let Some((disk, partition)) = lettered(vdev, "hd", 3, 63) {
        let major = if disk < 2 { 3 } else { 22 };
        return Some(major << 8 | (disk & 1) << 6 | partition);
    }
    if let Some((disk, partition)) = lettered(vdev, "sd", 15, 15) {
        return Some(8 << 8 | disk << 4 | partition);
    }
    let (number, rest) = number_first(vdev, Radix::ByPrefix)?;
    let number = u32::try_from(i32::try_from(number).ok()?).ok()?;
    rest.is_empty().then_some(number)
}

/// Disk and partition of `d0p1`.
fn numbered(vdev: &str) -> Option<(u32, u32)> {
    let (disk, rest) = number_first(vdev.strip_prefix('d')?, Radix::ByPrefix)?;
    let (partition, rest) = number_first(rest.strip_prefix('p')?, Radix::ByPrefix)?;
    let (disk, partition) = (u32::try_from(disk).ok()?, u32::try_from(partition).ok()?);
    (rest.is_empty() && disk < 1 << 20 && partition < 256).then_some((disk, partition))
}

/// Disk and partition of a name like `xvdaa1`: `prefix`, a number in letters, and from 1 a partition.
fn lettered(vdev: &str, prefix: &str, last: u32, last_partition: u32) -> Option<(u32, u32)> {
    let rest = vdev.strip_prefix(prefix)?;
    let digits = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let letters = &rest.as_bytes()[..rest.len() - digits.len()];
    // a is 1, z is 26, aa is 27: there is no zero.
    let count = letters.iter().try_fold(0u32, |count, letter| {
        count
            .checked_mul(26)?
            .checked_add((letter - b'a' + 1).into())
    })?;
    let disk = count.checked_sub(1)?;
    let partition = match digits {
        "" => 0,
        digits if digits.starts_with('0') => return None,
        digits => {
            let (partition, "") = number_first(digits, Radix::Ten)? else {
                return None;
            };
            u32::try_from(partition).ok()?
        }
    };
    (disk <= last && partition <= last_partition).then_some((disk, partition))
}

/// The number that `text` begins with, and what is behind it.
fn number_first(text: &str, radix: Radix) -> Option<(i64, &str)> {
    let (number, len) = c_number(text.as_bytes(), radix)?;
    Some((number, text.get(len..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vdev_has_the_number_that_the_guest_knows_it_by() {
        for (vdev, expected) in [
            ("xvda", 51712),
            ("xvdb15", 51743),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("xvda16", 1 << 28 | 16),
            ("d0p1", 51713),
            ("d010p0x1", 51712 + 8 * 16 + 1),
            ("d1048575p255", 1 << 28 | 1_048_575 << 8 | 255),
            ("hda", 768),
            ("hdd63", 22 << 8 | 1 << 6 | 63),
            ("sdc", 2080),
            ("51712", 51712),
            ("0xca00", 51712),
            ("0145000", 51712),
            ("+1", 1),
        ] {
            assert_eq!(number(vdev), Some(expected), "{vdev}");
        }
        for vdev in [
            "",
            "nonsense",
            "xvd",
            "xvd1",
            "xvda0",
            "xvda01",
            "xvda256",
            "xvda1a",
            "xvdzzzzz",
            "xvdé",
            "hde",
            "hda64",
            "sdq",
            "sda16",
            "d0",
            "d0p",
            "d1048576p0",
            "d0p256",
            "0x",
            "0xg",
            "08",
            "-1",
            "4294967296",
            "2147483648",
            "XVDA",
            "xvda b",
        ] {
            assert_eq!(number(vdev), None, "{vdev}");
        }
    }
}
