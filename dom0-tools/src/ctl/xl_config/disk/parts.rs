//! The parts of a disk's line, as xl tells them apart: of the patterns that match, the one counts that looks
//! furthest, and of those that look equally far, the first.

/// The parameters that xl knows, of the form `name=value`.
const NAMES: [&str; 15] = [
    "access",
    "active-disk",
    "backend",
    "backendtype",
    "colo-export",
    "colo-host",
    "colo-port",
    "devtype",
    "format",
    "grant_usage",
    "hidden-disk",
    "script",
    "specification",
    "target",
    "vdev",
];

/// The parameters without a value.
const FLAGS: [&str; 8] = [
    "cdrom",
    "colo",
    "direct-io-safe",
    "discard",
    "no-colo",
    "no-discard",
    "trusted",
    "untrusted",
];

/// What a target once began with, in place of a format, a back-end or a script.
const PREFIXES: [&str; 15] = [
    "aio", "drbd", "enbd", "file", "ioemu", "iscsi", "nbd", "phy", "qcow", "qcow2", "raw", "tap",
    "tap2", "tapdisk", "vhd",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Blank,
    Named(&'static str, &'a str),
    Flag(&'static str),
    Prefix(&'static str),
    /// With what is behind its equals sign, up to a comma.
    UnknownName(&'a str, &'a str),
    UnknownPrefix(&'a str),
    /// Its place says what it is.
    Positional(&'a str),
    /// An equals sign that belongs to no name.
    Stray,
}

/// A pattern that matches.
struct Match<'a> {
    /// How far it looks.
    reach: usize,
    /// How much of it the part is.
    len: usize,
    part: Part<'a>,
}

/// The part that `line` begins with, and what is behind it.
pub(super) fn first(line: &str) -> (Part<'_>, &str) {
    let matches = [
        blank(line),
        named(line),
        flag(line),
        unknown_name(line),
        prefix(line),
        unknown_prefix(line),
        positional(line),
    ];
    let mut longest: Option<Match<'_>> = None;
    for found in matches.into_iter().flatten() {
        if longest
            .as_ref()
            .is_none_or(|longest| found.reach > longest.reach)
        {
            longest = Some(found);
        }
    }
    match longest {
        Some(found) => (found.part, line.get(found.len..).unwrap_or_default()),
        None => (Part::Stray, line.get(1..).unwrap_or_default()),
    }
}

/// Whether `text` has the name of a parameter and an equals sign first.
pub(super) fn begins_with_parameter(text: &str) -> bool {
    text.split_once('=')
        .is_some_and(|(name, _)| NAMES.contains(&name))
}

fn blank(line: &str) -> Option<Match<'_>> {
    let behind = line.trim_start_matches([' ', '\t', '\n']);
    let len = line.len() - behind.len();
    (len > 0).then(|| Match {
        reach: len + rest_of_line(behind),
        len,
        part: Part::Blank,
    })
}

fn named(line: &str) -> Option<Match<'_>> {
    let (name, rest) = line.split_once('=')?;
    let name = *NAMES.iter().find(|known| **known == name)?;
    let len = match name {
        "target" => rest_of_line(rest),
        // It is 0 or 1, whatever follows.
        "grant_usage" => rest.starts_with(['0', '1']).then_some(1)?,
        _ => up_to_comma(rest).len(),
    };
    let value = &rest[..len];
    let start = name.len() + 1;
    let (value, len) = if name == "target" {
        (value.strip_suffix(',').unwrap_or(value), start + len)
    } else {
        (value, with_comma(line, start + len))
    };
    Some(Match {
        reach: len,
        len,
        part: Part::Named(name, value),
    })
}

fn flag(line: &str) -> Option<Match<'_>> {
    let word = word(line);
    let flag = *FLAGS.iter().find(|flag| **flag == word)?;
    let len = with_comma(line, word.len());
    Some(Match {
        reach: len,
        len,
        part: Part::Flag(flag),
    })
}

/// A name that xl does not know, with the first byte of its value.
fn unknown_name(line: &str) -> Option<Match<'_>> {
    let (name, rest) = line.split_once('=')?;
    let is_name = name.starts_with(is_lower)
        && name
            .chars()
            .all(|c| is_lower(c) || c.is_ascii_digit() || c == '-');
    let has_value = !rest.is_empty() && !rest.starts_with(',');
    (is_name && has_value).then(|| Match {
        reach: with_comma(line, name.len() + 2),
        len: line.len(),
        part: Part::UnknownName(name, up_to_comma(rest)),
    })
}

fn prefix(line: &str) -> Option<Match<'_>> {
    let (word, behind) = line.split_once(':')?;
    let known = *PREFIXES.iter().find(|prefix| **prefix == word)?;
    let len = word.len() + 1;
    Some(Match {
        reach: len + rest_of_line(behind),
        len,
        part: Part::Prefix(known),
    })
}

fn unknown_prefix(line: &str) -> Option<Match<'_>> {
    let (word, behind) = line.split_once(':')?;
    let is_in_word = |c: char| is_lower(c) || c.is_ascii_digit();
    if !word.starts_with(is_lower) || !word.chars().all(is_in_word) {
        return None;
    }
    let looks_behind = match behind.chars().next() {
        Some(c) if !is_in_word(c) => {
            let len = c.len_utf8();
            len + rest_of_line(&behind[len..])
        }
        _ => 0,
    };
    Some(Match {
        reach: word.len() + 1 + looks_behind,
        len: line.len(),
        part: Part::UnknownPrefix(word),
    })
}

/// What xl takes for a value without a name. It cannot go on with an equals sign, except for one that is the
/// line's last byte, which xl leaves out.
fn positional(line: &str) -> Option<Match<'_>> {
    let word = word(line);
    let len = with_comma(line, word.len());
    let value = line[word.len()..].strip_prefix('=').unwrap_or_default();
    (len > 0).then_some(Match {
        reach: len,
        len,
        part: if value.is_empty() {
            Part::Positional(word)
        } else {
            Part::UnknownName(word, up_to_comma(value))
        },
    })
}

/// What is before the first comma or equals sign.
fn word(line: &str) -> &str {
    line.split([',', '=']).next().unwrap_or_default()
}

fn up_to_comma(text: &str) -> &str {
    text.split(',').next().unwrap_or_default()
}

/// `at`, or what is behind the comma that is there.
fn with_comma(line: &str, at: usize) -> usize {
    at + usize::from(line.as_bytes().get(at) == Some(&b','))
}

fn rest_of_line(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

fn is_lower(c: char) -> bool {
    c.is_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(line: &str) -> Vec<Part<'_>> {
        let mut parts = Vec::new();
        let mut rest = line;
        while !rest.is_empty() {
            let (part, behind) = first(rest);
            parts.push(part);
            rest = behind;
        }
        parts
    }

    #[test]
    fn the_pattern_that_looks_furthest_counts() {
        use Part::{Blank, Flag, Named, Positional, Prefix, Stray, UnknownName, UnknownPrefix};
        for (line, expected) in [
            ("", vec![]),
            (
                "vdev=xvda, target=/a, b,",
                vec![Named("vdev", "xvda"), Blank, Named("target", "/a, b")],
            ),
            (
                "colo,colon,cdrom",
                vec![Flag("colo"), Positional("colon"), Flag("cdrom")],
            ),
            (
                "phy:/x,xvda:cdrom,",
                vec![Prefix("phy"), Positional("/x"), Positional("xvda:cdrom")],
            ),
            ("vmdk:/x", vec![UnknownPrefix("vmdk")]),
            ("vmdk:x", vec![Positional("vmdk:x")]),
            ("phy:\nx", vec![UnknownPrefix("phy")]),
            ("discard=1,/x", vec![UnknownName("discard", "1")]),
            ("discard=", vec![Flag("discard"), Stray]),
            ("a_b=", vec![Positional("a_b"), Stray]),
            (" a\nb,", vec![Positional(" a\nb")]),
            (
                " a,\nb",
                vec![Blank, Positional("a"), Blank, Positional("b")],
            ),
            (
                "target=/x\nraw",
                vec![Named("target", "/x"), Blank, Positional("raw")],
            ),
            (
                "grant_usage=12",
                vec![Named("grant_usage", "1"), Positional("2")],
            ),
            (
                "Vdev=,grant_usage=yes,",
                vec![
                    UnknownName("Vdev", ""),
                    Stray,
                    Positional(""),
                    UnknownName("grant_usage", "yes"),
                    Stray,
                    Positional("yes"),
                ],
            ),
            (",é,", vec![Positional(""), Positional("é")]),
        ] {
            assert_eq!(parts(line), expected, "{line:?}");
        }
    }
}
