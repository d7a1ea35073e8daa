//! Events of input devices by their names, as `xen-virtioctl input` takes them.

use crate::devices::input::MAX_EVENTS;
use anyhow::{Context, Result, bail, ensure};
use evdev::{AbsoluteAxisCode, KeyCode, RelativeAxisCode, SwitchCode};
use xen_virtio_backend::input::kind;

/// `SYN_REPORT`.
const REPORT: [i32; 3] = [0, 0, 0];

/// The events that `words` say, one after the other: `KEY_A` presses a key and lets it go, `KEY_A=1` presses it, `ABS_X=100` sets an
/// axis. Those that a plus joins (`ABS_X=1+ABS_Y=2`) happen at once. Type, code and value of each.
///
/// # Errors
///
/// The word that is none.
pub fn parse(words: &[String]) -> Result<Vec<[i32; 3]>> {
    let mut events = Vec::new();
    for word in words {
        let (mut first, mut then) = (Vec::new(), Vec::new());
        for part in word.split('+') {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => {
                    let value = value.parse().ok();
                    let value: i32 =
                        value.with_context(|| format!("{part}: {name} is set to no number"))?;
                    (name, Some(value))
                }
                None => (part, None),
            };
            let (of, code) = code(name)?;
            match value {
                Some(value) => first.push([of, code, value]),
                None => {
                    ensure!(
                        of == i32::from(kind::KEY),
                        "{name} is no key: say to what it is set, {name}=1"
                    );
                    first.push([of, code, 1]);
                    then.insert(0, [of, code, 0]);
                }
            }
        }
        first.push(REPORT);
        events.extend(first);
        if !then.is_empty() {
            then.push(REPORT);
            events.extend(then);
        }
    }
    ensure!(
        events.len() <= MAX_EVENTS,
        "{} events are more than {MAX_EVENTS} at once",
        events.len()
    );
    Ok(events)
}

/// Type and code of what has this name in `linux/input-event-codes.h`.
fn code(name: &str) -> Result<(i32, i32)> {
    let key = || Some((kind::KEY, name.parse::<KeyCode>().ok()?.0));
    let relative = || Some((kind::RELATIVE, name.parse::<RelativeAxisCode>().ok()?.0));
    let absolute = || Some((kind::ABSOLUTE, name.parse::<AbsoluteAxisCode>().ok()?.0));
    let switch = || Some((kind::SWITCH, name.parse::<SwitchCode>().ok()?.0));
    let found = key().or_else(relative).or_else(absolute).or_else(switch);
    match found {
        Some((of, code)) => Ok((of.into(), code.into())),
        None => bail!(
            "{name:?} is no event: KEY_A, BTN_LEFT, REL_WHEEL=-1, ABS_X=100, SW_LID=1, as in linux/input-event-codes.h"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Vec<[i32; 3]>> {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words)
    }

    #[test]
    fn words_are_events() {
        for (line, expected) in [
            ("KEY_A", vec![[1, 30, 1], REPORT, [1, 30, 0], REPORT]),
            ("KEY_A=1", vec![[1, 30, 1], REPORT]),
            (
                "KEY_LEFTCTRL+KEY_C",
                vec![
                    [1, 29, 1],
                    [1, 46, 1],
                    REPORT,
                    [1, 46, 0],
                    [1, 29, 0],
                    REPORT,
                ],
            ),
            ("REL_WHEEL=-1", vec![[2, 8, -1], REPORT]),
            (
                "ABS_X=100+ABS_Y=7 BTN_LEFT=0",
                vec![[3, 0, 100], [3, 1, 7], REPORT, [1, 0x110, 0], REPORT],
            ),
            ("SW_LID=1", vec![[5, 0, 1], REPORT]),
            ("", Vec::new()),
        ] {
            assert_eq!(parsed(line).unwrap(), expected, "{line}");
        }
        for (line, wrong) in [
            ("KEY_NOTHING", "\"KEY_NOTHING\" is no event"),
            ("KEY_A KEY_A=x", "KEY_A=x: KEY_A is set to no number"),
            ("ABS_X", "ABS_X is no key: say to what it is set, ABS_X=1"),
            ("KEY_A+", "\"\" is no event"),
            (&"KEY_A ".repeat(65), "260 events are more than 256"),
        ] {
            let error = parsed(line).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
    }
}
