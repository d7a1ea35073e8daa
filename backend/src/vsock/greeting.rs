//! What a program of the host's says first: `CONNECT PORT`, and what it is answered, as Firecracker's users know it.

/// The longest line, with its end.
const LONGEST: usize = 32;

/// A line of which some has come.
#[derive(Debug, Default)]
pub(super) struct Greeting(Vec<u8>);

/// What a byte more has made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeted {
    NotYet,
    /// The guest's port that is wanted.
    Port(u32),
    /// It is no such line.
    Wrong,
}

impl Greeting {
    pub(super) fn add(&mut self, byte: u8) -> Greeted {
        if byte != b'\n' {
            self.0.push(byte);
            return match self.0.len() < LONGEST {
                true => Greeted::NotYet,
                false => Greeted::Wrong,
            };
        }
        let line = std::str::from_utf8(&self.0).unwrap_or_default();
        let port = line.strip_prefix("CONNECT ");
        let is_number = |port: &&str| port.bytes().all(|byte| byte.is_ascii_digit());
        match port
            .filter(is_number)
            .and_then(|port| port.parse::<u32>().ok())
        {
            Some(port) => Greeted::Port(port),
            None => Greeted::Wrong,
        }
    }
}

/// The answer, once the guest has accepted: the host's port that the connection has.
pub(super) fn accepted(port: u32) -> String {
    format!("OK {port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeted(line: &str) -> Greeted {
        let mut greeting = Greeting::default();
        let mut bytes = line.bytes().map(|byte| greeting.add(byte));
        let ended = bytes.find(|greeted| *greeted != Greeted::NotYet);
        ended.unwrap_or(Greeted::NotYet)
    }

    #[test]
    fn a_line_names_a_port() {
        for (line, expected) in [
            ("CONNECT 52\n", Greeted::Port(52)),
            ("CONNECT 0\nCONNECT 1\n", Greeted::Port(0)),
            ("CONNECT 4294967295\n", Greeted::Port(u32::MAX)),
            ("CONNECT 52", Greeted::NotYet),
            ("", Greeted::NotYet),
            ("CONNECT 4294967296\n", Greeted::Wrong),
            ("CONNECT +5\n", Greeted::Wrong),
            ("CONNECT \n", Greeted::Wrong),
            ("CONNECT 5 \n", Greeted::Wrong),
            ("CONNECT 5\r\n", Greeted::Wrong),
            ("connect 5\n", Greeted::Wrong),
            ("\n", Greeted::Wrong),
            ("CONNECT 00000000000000000000000005\n", Greeted::Wrong),
        ] {
            assert_eq!(greeted(line), expected, "{line:?}");
        }
    }
}
