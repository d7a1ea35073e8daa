//! The settings of an xl file (xl.cfg(5), "SYNTAX"): names, and the strings and numbers that they are set to.

use std::collections::HashMap;
use std::iter::Peekable;

/// Lists in each other, of which xl knows no use for more than two.
const MAX_DEPTH: usize = 8;

/// What a name is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Single(String),
    /// The strings of a list, and of the lists in it.
    List(Vec<String>),
}

/// Reads `text`. What is set twice counts as it is set last.
///
/// # Errors
///
/// What xl would not understand, with its line.
pub(super) fn parse(text: &str) -> Result<HashMap<String, Value>, String> {
    let mut parser = Parser {
        words: Words {
            rest: text,
            line: 1,
        }
        .peekable(),
        line: 1,
    };
    let mut settings = HashMap::new();
    while let Some(word) = parser.next() {
        match word {
            Word::Mark('\n' | ';') => {}
            Word::Bare(name) => parser.setting(name, &mut settings)?,
            other => return Err(parser.wrong("the name of a setting", Some(&other))),
        }
    }
    Ok(settings)
}

struct Parser<'a> {
    words: Peekable<Words<'a>>,
    /// Of the last word.
    line: usize,
}

impl<'a> Parser<'a> {
    fn next(&mut self) -> Option<Word<'a>> {
        let (line, word) = self.words.next()?;
        self.line = line;
        Some(word)
    }

    fn setting(&mut self, name: &str, settings: &mut HashMap<String, Value>) -> Result<(), String> {
        let mut operator = self.next();
        let adds = operator == Some(Word::Mark('+'));
        if adds {
            operator = self.next();
        }
        if operator != Some(Word::Mark('=')) {
            return Err(self.wrong(&format!("= behind {name}"), operator.as_ref()));
        }
        let value = self.value(0)?;
        match self.next() {
            None | Some(Word::Mark('\n' | ';')) => {}
            other => return Err(self.wrong(&format!("the end of {name}"), other.as_ref())),
        }
        match (settings.get_mut(name), value) {
            (Some(Value::List(list)), Value::List(more)) if adds => list.extend(more),
            (Some(Value::Single(single)), Value::Single(more)) if adds => single.push_str(&more),
            (_, value) => drop(settings.insert(name.to_owned(), value)),
        }
        Ok(())
    }

    /// A value in `depth` lists.
    fn value(&mut self, depth: usize) -> Result<Value, String> {
        match self.next() {
            Some(Word::Quoted(text)) => Ok(Value::Single(text.to_owned())),
            Some(Word::Bare(number)) if number.starts_with(|c: char| c.is_ascii_digit()) => {
                Ok(Value::Single(number.to_owned()))
            }
            Some(Word::Mark('[')) if depth == MAX_DEPTH => Err(format!(
                "line {}: more than {MAX_DEPTH} lists in each other",
                self.line
            )),
            Some(Word::Mark('[')) => self.list(depth + 1).map(Value::List),
            other => Err(self.wrong("a number, \"…\" or [ … ]", other.as_ref())),
        }
    }

    /// What follows the `[` of a list in a list, `depth` in all, up to its `]`.
    fn list(&mut self, depth: usize) -> Result<Vec<String>, String> {
        let mut list = Vec::new();
        loop {
            self.skip_lines();
            if self
                .words
                .next_if(|(_, word)| *word == Word::Mark(']'))
                .is_some()
            {
                return Ok(list);
            }
            match self.value(depth)? {
                Value::Single(text) => list.push(text),
                Value::List(texts) => list.extend(texts),
            }
            self.skip_lines();
            match self.next() {
                Some(Word::Mark(',')) => {}
                Some(Word::Mark(']')) => return Ok(list),
                other => return Err(self.wrong(", or ]", other.as_ref())),
            }
        }
    }

    fn skip_lines(&mut self) {
        while self
            .words
            .next_if(|(_, word)| *word == Word::Mark('\n'))
            .is_some()
        {}
    }

    fn wrong(&self, expected: &str, found: Option<&Word<'_>>) -> String {
        let found = match found {
            None => "the file's end".to_owned(),
            Some(Word::Mark('\n')) => "the line's end".to_owned(),
            Some(Word::Mark(mark)) => mark.to_string(),
            Some(Word::Bare(text)) => (*text).to_owned(),
            Some(Word::Quoted(text)) => format!("{text:?}"),
            Some(Word::Open(text)) => format!("a quote that is not closed: {text}"),
        };
        format!(
            "line {}: xl expects {expected} and finds {found}",
            self.line
        )
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Word<'a> {
    /// A name or a number.
    Bare(&'a str),
    Quoted(&'a str),
    /// A quote that its line does not close.
    Open(&'a str),
    Mark(char),
}

struct Words<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Words<'a> {
    fn take(&mut self, len: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        taken
    }
}

impl<'a> Iterator for Words<'a> {
    /// With its line, from 1.
    type Item = (usize, Word<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r']);
        if self.rest.starts_with('#') {
            self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
        }
        let line = self.line;
        let first = self.rest.chars().next()?;
        let word = match first {
            quote @ ('\'' | '"') => {
                self.take(1);
                let end = self.rest.find([quote, '\n']).unwrap_or(self.rest.len());
                let inside = self.take(end);
                if self.rest.starts_with(quote) {
                    self.take(1);
                    Word::Quoted(inside)
                } else {
                    Word::Open(inside)
                }
            }
            mark if "=[],;+\n".contains(mark) => {
                self.take(1);
                self.line += usize::from(mark == '\n');
                Word::Mark(mark)
            }
            _ => {
                let end = |c: char| c.is_whitespace() || "#'\"=[],;+".contains(c);
                let len = self.rest.find(end).unwrap_or(self.rest.len());
                // White space that is none of xl's.
                Word::Bare(self.take(len.max(first.len_utf8())))
            }
        };
        Some((line, word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn settings_are_read_as_xl_reads_them() {
        let text = "# a guest\nname = 'ivi' ; vcpus=2\nmemory=0x80 # MiB\n\
                    disk = [\n 'a, b', # first\n\n \"it's\",\n]\ndisk += [ 'c' ]\nextra=\"x\"\nextra += \" y\"\n\
                    vnuma = [ [ 'n=0' ], [ 'n=1', 'm' ] ]\nname='other'\nempty = []";
        let settings = parse(text).unwrap();
        let single = |text: &str| Value::Single(text.to_owned());
        let list =
            |texts: &[&str]| Value::List(texts.iter().map(|&text| text.to_owned()).collect());
        for (name, value) in [
            ("name", single("other")),
            ("vcpus", single("2")),
            ("memory", single("0x80")),
            ("disk", list(&["a, b", "it's", "c"])),
            ("extra", single("x y")),
            ("vnuma", list(&["n=0", "n=1", "m"])),
            ("empty", list(&[])),
        ] {
            assert_eq!(settings.get(name), Some(&value), "{name}");
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
                "finds a quote that is not closed: ivi",
            ),
            ("name =\n'a'", "finds the line's end"),
            ("a = 1 b = 2", "line 1: xl expects the end of a and finds b"),
            (
                "disk =\t[[[[[[[[[",
                "line 1: more than 8 lists in each other",
            ),
            (
                "\n] = 1",
                "line 2: xl expects the name of a setting and finds ]",
            ),
            (
                "'a' = 1",
                "xl expects the name of a setting and finds \"a\"",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text: String, marks in "[a1='\",;+#\\[\\] \n]{0,40}") {
            let _ = parse(&text);
            let _ = parse(&marks);
        }
    }
}
