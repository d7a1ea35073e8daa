//! The words of an xl file, as xl tells them apart.

use super::super::c_number::{Radix, c_number};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    Name(String),
    Number(String),
    /// What quotes enclose, without them.
    Text(String),
    /// One of `= , ; [ ]`.
    Mark(char),
    /// `+=`
    Adds,
    /// The end of a line, with the comment before it.
    LineEnd,
}

pub(super) struct Words<'a> {
    rest: &'a [u8],
    /// Of `rest`, from 1.
    line: usize,
    /// Of the last word.
    last_line: usize,
    left_out: Option<(usize, u8)>,
}

impl<'a> Words<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self {
            rest: text,
            line: 1,
            last_line: 1,
            left_out: None,
        }
    }

    /// The line of the last word.
    pub(super) fn last_line(&self) -> usize {
        self.last_line
    }

    /// The last byte of the file and its line, if it begins no word. xl leaves it out and says nothing.
    pub(super) fn left_out(&self) -> Option<(usize, u8)> {
        self.left_out
    }

    /// # Errors
    ///
    /// If the file goes on with what is no word of xl's.
    pub(super) fn next_word(&mut self) -> Result<Option<Word>, String> {
        self.take_while(|byte| matches!(byte, b' ' | b'\t'));
        self.last_line = self.line;
        let Some(&first) = self.rest.first() else {
            return Ok(None);
        };
        Ok(Some(match first {
            b'a'..=b'z' => Word::Name(
                self.take_text(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_')),
            ),
            b'0'..=b'9' => Word::Number(
                self.take_text(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'x')),
            ),
            b'=' | b',' | b';' | b'[' | b']' => {
                self.take(1);
                Word::Mark(char::from(first))
            }
            b'+' if self.rest.starts_with(b"+=") => {
                self.take(2);
                Word::Adds
            }
            // A comment is one only with the end of its line.
            b'\n' | b'#' if self.rest.contains(&b'\n') => {
                self.take_while(|byte| byte != b'\n');
                self.take(1);
                self.line += 1;
                Word::LineEnd
            }
            b'\'' | b'"' => match inside_quotes(self.rest) {
                Some(inside) => {
                    self.take(inside.len() + 2);
                    Word::Text(self.unescape(inside)?)
                }
                None => return self.no_word(first),
            },
            _ => return self.no_word(first),
        }))
    }

    /// The next word that is no end of a line.
    ///
    /// # Errors
    ///
    /// As for [`next_word`](Self::next_word).
    pub(super) fn next_in_list(&mut self) -> Result<Option<Word>, String> {
        loop {
            match self.next_word()? {
                Some(Word::LineEnd) => {}
                other => return Ok(other),
            }
        }
    }

    /// The error of a word that is not as the grammar has it.
    pub(super) fn unexpected(&self, expected: &str, found: Option<&Word>) -> String {
        let found = match found {
            None => "the file's end".to_owned(),
            Some(Word::LineEnd) => "the line's end".to_owned(),
            Some(Word::Adds) => "+=".to_owned(),
            Some(Word::Mark(mark)) => mark.to_string(),
            Some(Word::Name(text) | Word::Number(text)) => text.clone(),
            Some(Word::Text(text)) => format!("{text:?}"),
        };
        format!(
            "line {}: xl expects {expected} and finds {found}",
            self.last_line
        )
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        taken
    }

    fn take_while(&mut self, belongs: impl Fn(u8) -> bool) -> &'a [u8] {
        let len = self.rest.iter().take_while(|byte| belongs(**byte)).count();
        self.take(len)
    }

    fn take_text(&mut self, belongs: impl Fn(u8) -> bool) -> String {
        String::from_utf8_lossy(self.take_while(belongs)).into_owned()
    }

    /// What the text `inside` quotes stands for.
    fn unescape(&self, inside: &[u8]) -> Result<String, String> {
        let mut plain = Vec::with_capacity(inside.len());
        let mut rest = inside;
        while let Some((&byte, behind)) = rest.split_first() {
            rest = behind;
            if byte == 0 {
                return Err(self.error("a NUL byte in quotes ends xl: remove it"));
            }
            if byte != b'\\' {
                plain.push(byte);
                continue;
            }
            // A backslash is never the last byte in quotes.
            let Some((&escaped, behind)) = rest.split_first() else {
                break;
            };
            rest = behind;
            plain.push(match escaped {
                b'"' | b'\'' | b'\\' => escaped,
                b'a' => 0x07,
                b'b' => 0x08,
                b't' => b'\t',
                b'n' => b'\n',
                b'v' => 0x0b,
                b'f' => 0x0c,
                b'r' => b'\r',
                b'0'..=b'7' => {
                    // xl looks at three bytes behind the first digit, wants a number of two or more, and
                    // puts no byte in its place.
                    let number = c_number(&rest[..rest.len().min(3)], Radix::Ten);
                    let Some((_, len @ 2..)) = number else {
                        return Err(self.bad_escape(escaped));
                    };
                    rest = &rest[len..];
                    continue;
                }
                _ => return Err(self.bad_escape(escaped)),
            });
        }
        Ok(String::from_utf8_lossy(&plain).into_owned())
    }

    fn bad_escape(&self, escaped: u8) -> String {
        self.error(&format!(
            "xl cannot read \\{} in quotes: write \\\\ for a backslash",
            char::from(escaped)
        ))
    }

    /// The end of the file, where xl leaves out a last byte that begins no word; else an error.
    fn no_word(&mut self, first: u8) -> Result<Option<Word>, String> {
        if self.rest.len() == 1 {
            self.rest = &[];
            self.left_out = Some((self.line, first));
            return Ok(None);
        }
        let remedy = match first {
            b'\r' => "lines must end in a line feed alone, as dos2unix writes them",
            b'\'' | b'"' => "close the quote on its line",
            b'#' => "end the comment with a line feed",
            b'A'..=b'Z' => "names are in lower case, numbers have no unit, texts have quotes",
            _ => "names have a-z, 0-9, . and _, and texts have quotes",
        };
        let text = self.take_text(|byte| !matches!(byte, b' ' | b'\t' | b'\n'));
        Err(self.error(&format!("xl cannot read {text}: {remedy}")))
    }

    fn error(&self, text: &str) -> String {
        format!("line {}: {text}", self.last_line)
    }
}

/// What the quotes enclose that `text` begins with. `None` if they are not closed on their line.
fn inside_quotes(text: &[u8]) -> Option<&[u8]> {
    let (quote, inside) = text.split_first()?;
    let mut len = 0;
    loop {
        let byte = inside.get(len)?;
        if byte == quote {
            return Some(&inside[..len]);
        }
        if *byte == b'\\' {
            len += 1;
        }
        // Also an escaped line feed ends the line.
        if *inside.get(len)? == b'\n' {
            return None;
        }
        len += 1;
    }
}
