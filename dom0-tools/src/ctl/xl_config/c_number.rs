//! Numbers as C's `strtol` and `scanf` read them, by which xl and libxl read theirs.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Radix {
    Ten,
    /// 16 behind `0x`, 8 behind another `0`, else 10.
    ByPrefix,
}

/// The number at the start of `text`, and how many bytes it has. White space and a sign may come first.
/// `None` without a digit; what is too large or too small is the nearest number that there is.
pub(super) fn c_number(text: &[u8], radix: Radix) -> Option<(i64, usize)> {
    let is_blank = |byte: &&u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let mut at = text.iter().take_while(is_blank).count();
    let negative = text.get(at) == Some(&b'-');
    at += usize::from(matches!(text.get(at), Some(b'+' | b'-')));
    let digit_at = |at: usize, radix: u32| -> Option<u32> {
        let byte = *text.get(at)?;
        char::from(byte).to_digit(radix)
    };
    let radix = match (radix, text.get(at), text.get(at + 1)) {
        (Radix::ByPrefix, Some(b'0'), Some(b'x' | b'X')) if digit_at(at + 2, 16).is_some() => 16,
        (Radix::ByPrefix, Some(b'0'), _) => 8,
        _ => 10,
    };
    if radix == 16 {
        at += 2;
    }
    let start = at;
    let mut number = 0_i64;
    while let Some(digit) = digit_at(at, radix) {
        let digit = i64::from(digit);
        let shifted = number.saturating_mul(i64::from(radix));
        number = if negative {
            shifted.saturating_sub(digit)
        } else {
            shifted.saturating_add(digit)
        };
        at += 1;
    }
    (at > start).then_some((number, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_ends_where_its_digits_do() {
        for (text, ten, by_prefix) in [
            ("12ab", Some((12, 2)), Some((12, 2))),
            (" \t-5", Some((-5, 4)), Some((-5, 4))),
            ("+010", Some((10, 4)), Some((8, 4))),
            ("0x1fg", Some((0, 1)), Some((31, 4))),
            ("0xg", Some((0, 1)), Some((0, 1))),
            ("08", Some((8, 2)), Some((0, 1))),
            (
                "99999999999999999999",
                Some((i64::MAX, 20)),
                Some((i64::MAX, 20)),
            ),
            (
                "-99999999999999999999",
                Some((i64::MIN, 21)),
                Some((i64::MIN, 21)),
            ),
            ("", None, None),
            ("-", None, None),
            ("- 4", None, None),
            ("x", None, None),
        ] {
            assert_eq!(c_number(text.as_bytes(), Radix::Ten), ten, "{text}");
            assert_eq!(
                c_number(text.as_bytes(), Radix::ByPrefix),
                by_prefix,
                "{text}"
            );
        }
    }
}
