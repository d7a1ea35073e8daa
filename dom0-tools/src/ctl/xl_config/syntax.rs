//! The settings of an xl file (xl.cfg(5), "SYNTAX"): names, and what they are set to.

mod words;

use std::collections::HashMap;
use words::{Word, Words};

/// Lists in each other. xl's own limit is some thousands; none of its settings has more than two.
const MAX_DEPTH: usize = 1000;

/// What a name is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number or a text.
    Single(String),
    List(Vec<Value>),
}

/// What xl reads in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    values: HashMap<String, Value>,
    left_out: Option<(usize, u8)>,
}

impl Settings {
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// The number or text that `name` is set to.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::Single(text) => Some(text.as_str()),
            Value::List(_) => None,
        }
    }

    /// The last byte of the file and its line, if xl leaves it out.
    pub fn left_out(&self) -> Option<(usize, u8)> {
        self.left_out
    }
}

/// Reads `text` as xl does. What is set twice counts as it is set last.
///
/// # Errors
///
/// What xl would not understand, with its line.
pub fn parse(text: &[u8]) -> Result<Settings, String> {
    let mut words = Words::new(text);
    let mut values = HashMap::new();
    while let Some(word) = words.next_word()? {
        match word {
            Word::LineEnd | Word::Mark(';') => {}
            Word::Name(name) => set(name, &mut words, &mut values)?,
            other => return Err(words.unexpected("the name of a setting", Some(&other))),
        }
    }
    let left_out = words.left_out();
    Ok(Settings { values, left_out })
}

/// Reads what follows the `name` of a setting.
fn set(
    name: String,
    words: &mut Words<'_>,
    values: &mut HashMap<String, Value>,
) -> Result<(), String> {
    let adds = match words.next_word()? {
        Some(Word::Mark('=')) => false,
        Some(Word::Adds) => true,
        other => return Err(words.unexpected(&format!("= behind {name}"), other.as_ref())),
    };
    let mut value = read_value(words)?;
    let line = words.last_line();
    match words.next_word()? {
        None | Some(Word::LineEnd | Word::Mark(';')) => {}
        other => return Err(words.unexpected(&format!("the end of {name}"), other.as_ref())),
    }
    if adds && let Some(earlier) = values.remove(&name) {
        value = match (earlier, value) {
            (Value::List(mut list), Value::List(more)) => {
                list.extend(more);
                Value::List(list)
            }
            (Value::Single(text), Value::Single(more)) => Value::Single(text + &more),
            (Value::Single(_), Value::List(_)) => {
                return Err(format!(
                    "line {line}: {name} is a text, to which xl adds no list: make it {name} = [ … ]"
                ));
            }
            (Value::List(_), Value::Single(_)) => {
                return Err(format!(
                    "line {line}: {name} is a list, to which xl adds no text: write {name} += [ … ]"
                ));
            }
        };
    }
    values.insert(name, value);
    Ok(())
}

fn read_value(words: &mut Words<'_>) -> Result<Value, String> {
    // The innermost is the last.
    let mut open_lists: Vec<Vec<Value>> = Vec::new();
    let mut word = words.next_word()?;
    loop {
        let mut value = match word {
            Some(Word::Number(text) | Word::Text(text)) => Value::Single(text),
            Some(Word::Mark('[')) if open_lists.len() == MAX_DEPTH => {
                return Err(format!(
                    "line {}: more than {MAX_DEPTH} lists in each other",
                    words.last_line()
                ));
            }
            Some(Word::Mark('[')) => {
                open_lists.push(Vec::new());
                word = words.next_in_list()?;
                continue;
            }
            Some(Word::Mark(']')) if !open_lists.is_empty() => {
                Value::List(open_lists.pop().unwrap_or_default())
            }
            other => return Err(words.unexpected("a number, \"…\" or [ … ]", other.as_ref())),
        };
        // The value may be the last one of its list, and that list the last one of the list around it.
        loop {
            let Some(list) = open_lists.last_mut() else {
                return Ok(value);
            };
            list.push(value);
            match words.next_in_list()? {
                Some(Word::Mark(',')) => break,
                Some(Word::Mark(']')) => {
                    value = Value::List(open_lists.pop().unwrap_or_default());
                }
                other => return Err(words.unexpected(", or ]", other.as_ref())),
            }
        }
        word = words.next_in_list()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn single(text: &str) -> Value {
        Value::Single(text.to_owned())
    }

    fn list(texts: &[&str]) -> Value {
        Value::List(texts.iter().map(|text| single(text)).collect())
    }

    #[test]
    fn settings_are_read_as_xl_reads_them() {
        let text = "# a guest\nname = 'ivi' ; vcpus=2\nmemory=0x80 # MiB\n\
                    disk = [\n 'a, b', # first\n\n \"it's\",\n]\ndisk += [ 'c' ]\nextra=\"x\"\nextra += \" y\"\n\
                    vnuma = [ [ 'n=0' ], [ 'n=1', 'm' ] ]\nname='other'\nempty = []\n\
                    a.b_1+=1\ncmdline = \"a \\\"q\\\" \\\\ \\101b\"";
        let settings = parse(text.as_bytes()).unwrap();
        for (name, value) in [
            ("name", single("other")),
            ("vcpus", single("2")),
            ("memory", single("0x80")),
            ("disk", list(&["a, b", "it's", "c"])),
            ("extra", single("x y")),
            (
                "vnuma",
                Value::List(vec![list(&["n=0"]), list(&["n=1", "m"])]),
            ),
            ("empty", list(&[])),
            ("a.b_1", single("1")),
            ("cmdline", single("a \"q\" \\ b")),
        ] {
            assert_eq!(settings.get(name), Some(&value), "{name}");
        }
        assert_eq!(settings.left_out(), None);
    }

    #[test]
    fn the_last_byte_of_a_file_is_left_out_where_it_begins_no_word() {
        for (text, left_out) in [
            ("memory = 128M", (1, b'M')),
            ("a = 1\n#", (2, b'#')),
            ("a = 1\r", (1, b'\r')),
        ] {
            assert_eq!(
                parse(text.as_bytes()).unwrap().left_out(),
                Some(left_out),
                "{text:?}"
            );
        }
    }

    #[test]
    fn what_xl_cannot_read_is_named_with_its_line() {
        for (text, expected) in [
            (
                "name='a'\n\ndisk = [ 'x'\nmemory = 1",
                "line 4: xl expects , or ] and finds memory",
            ),
            (
                "disk = [ 'x',",
                "line 1: xl expects a number, \"…\" or [ … ] and finds the file's end",
            ),
            ("a = 1\nb 2\n", "line 2: xl expects = behind b and finds 2"),
            (
                "b",
                "line 1: xl expects = behind b and finds the file's end",
            ),
            (
                "name = ivi",
                "line 1: xl expects a number, \"…\" or [ … ] and finds ivi",
            ),
            (
                "name = 'ivi\nmemory = 1",
                "line 1: xl cannot read 'ivi: close the quote",
            ),
            ("name =\n'a'", "finds the line's end"),
            ("a = 1 b = 2", "line 1: xl expects the end of a and finds b"),
            ("a = 1 += 2", "line 1: xl expects the end of a and finds +="),
            ("disk = [;]", "and finds ;"),
            (
                "\n] = 1",
                "line 2: xl expects the name of a setting and finds ]",
            ),
            (
                "'a' = 1",
                "xl expects the name of a setting and finds \"a\"",
            ),
            ("a = 1\r\n", "line 1: xl cannot read \r: lines must end"),
            (
                "a = 1\n# the last",
                "line 2: xl cannot read #: end the comment",
            ),
            (
                "memory = 128M\n",
                "line 1: xl cannot read M: names are in lower case",
            ),
            ("on-reboot = 1\n", "line 1: xl cannot read -reboot: names"),
            ("a + = 'x'", "line 1: xl cannot read +: names"),
            (
                "disk = 'a'\n\ndisk += ['b']\n",
                "line 3: disk is a text, to which xl adds no list",
            ),
            (
                "disk = ['a']\ndisk += 'b'\n",
                "line 2: disk is a list, to which xl adds no text",
            ),
            ("a = 'b\\z'", "line 1: xl cannot read \\z in quotes"),
            ("a = '\\x41'", "line 1: xl cannot read \\x in quotes"),
            ("a = '\\1'", "line 1: xl cannot read \\1 in quotes"),
            ("a = 'b\0'", "line 1: a NUL byte"),
            ("a = 'b\\", "line 1: xl cannot read 'b\\: close the quote"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn lists_are_nested_to_a_limit() {
        let nested = |depth| format!("a = {}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(nested(MAX_DEPTH).as_bytes()).is_ok());
        let error = parse(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err();
        assert!(
            error.contains("more than 1000 lists in each other"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_judged(bytes: Vec<u8>, marks in "[a1='\",;+#\\\\\\[\\] \n]{0,40}") {
            let _ = parse(&bytes);
            let _ = parse(marks.as_bytes());
        }
    }
}
