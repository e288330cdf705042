//! The keys that detach a terminal from its program, and their detection in the input.
//!
//! Written as for podman and docker: `ctrl-p,ctrl-q`. An empty text disables detaching.

use std::str::FromStr;

/// The default.
pub(crate) const DEFAULT: &str = "ctrl-p,ctrl-q";

/// A sequence of bytes that detaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

/// A text that is not a sequence of keys.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a key; write keys as ctrl-p,ctrl-q: single characters, or ctrl- and one of a-z @ [ \\ ] ^ _"
)]
pub(crate) struct DetachKeysError(String);

impl FromStr for DetachKeys {
    type Err = DetachKeysError;

    fn from_str(text: &str) -> Result<Self, DetachKeysError> {
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        text.split(',').map(key).collect::<Result<_, _>>().map(Self)
    }
}

fn key(text: &str) -> Result<u8, DetachKeysError> {
    let wrong = || DetachKeysError(text.to_owned());
    match text.strip_prefix("ctrl-").map(str::as_bytes) {
        // The control characters of ASCII are 64 below the upper case letters and their neighbours.
        Some([letter @ b'a'..=b'z']) => Ok(letter.to_ascii_uppercase() - b'@'),
        Some([sign @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(sign - b'@'),
        Some(_) => Err(wrong()),
        None => match text.as_bytes() {
            [byte] if byte.is_ascii_graphic() => Ok(*byte),
            _ => Err(wrong()),
        },
    }
}

/// Finds the keys in the input.
#[derive(Debug)]
pub(crate) struct Watcher {
    keys: Vec<u8>,
    /// How many of them the input ends with.
    seen: usize,
}

/// The result of some input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// It goes to the program. A partial sequence at the end is held back until it is known what
    /// follows.
    Input(Vec<u8>),
    /// This goes to the program; the keys followed.
    Detach(Vec<u8>),
}

impl Watcher {
    pub(crate) fn new(keys: DetachKeys) -> Self {
        Self { keys: keys.0, seen: 0 }
    }

    /// Takes the next input.
    pub(crate) fn take(&mut self, typed: &[u8]) -> Typed {
        if self.keys.is_empty() {
            return Typed::Input(typed.to_vec());
        }
        let mut passed = Vec::with_capacity(typed.len());
        for byte in typed {
            // On a mismatch, the shortest prefix of the held back keys is released after which the
            // rest begins the sequence again.
            while self.seen > 0 && self.keys.get(self.seen) != Some(byte) {
                let before = self.seen;
                let held = self.keys.get(..before).unwrap_or_default();
                let kept =
                    (0..before).rev().find(|kept| held.ends_with(held.get(..*kept).unwrap_or_default()));
                self.seen = kept.unwrap_or(0);
                passed.extend_from_slice(held.get(..before - self.seen).unwrap_or_default());
            }
            if self.keys.get(self.seen) == Some(byte) {
                self.seen += 1;
                if self.seen == self.keys.len() {
                    return Typed::Detach(passed);
                }
            } else {
                passed.push(*byte);
            }
        }
        Typed::Input(passed)
    }

    /// The keys held back, at the end of the input.
    pub(crate) fn rest(&self) -> &[u8] {
        self.keys.get(..self.seen).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watcher(keys: &str) -> Watcher {
        Watcher::new(keys.parse().unwrap())
    }

    #[test]
    fn keys_are_read_and_mistakes_named() {
        assert_eq!(DEFAULT.parse(), Ok(DetachKeys(vec![16, 17])));
        assert_eq!("a,ctrl-@,ctrl-[,ctrl-\\,~".parse(), Ok(DetachKeys(vec![b'a', 0, 27, 28, b'~'])));
        assert_eq!("".parse(), Ok(DetachKeys(vec![])));
        for text in ["ctrl-", "ctrl-P", "ctrl-pq", "pq", ",", "a,", "\u{e4}", "\n", "ctrl-1"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_keys_are_found_however_they_come() {
        let mut one = watcher("ctrl-p,ctrl-q");
        assert_eq!(one.take(b"ls\x10"), Typed::Input(b"ls".to_vec()));
        assert_eq!(one.rest(), b"\x10");
        assert_eq!(one.take(b"\x10x"), Typed::Input(b"\x10\x10x".to_vec()));
        assert_eq!(one.take(b"ab\x10\x11cd"), Typed::Detach(b"ab".to_vec()));
        let mut pieces = watcher("ctrl-p,ctrl-q");
        assert_eq!(pieces.take(b"\x10"), Typed::Input(vec![]));
        assert_eq!(pieces.take(b"\x11"), Typed::Detach(vec![]));
    }

    #[test]
    fn a_sequence_that_begins_within_itself_is_found() {
        assert_eq!(watcher("a,a,b").take(b"aaab"), Typed::Detach(b"a".to_vec()));
        assert_eq!(watcher("a,b,a,c").take(b"ababac"), Typed::Detach(b"ab".to_vec()));
        assert_eq!(watcher("a,b,a,c").take(b"abx"), Typed::Input(b"abx".to_vec()));
    }

    #[test]
    fn without_keys_all_goes_to_the_program() {
        assert_eq!(watcher("").take(b"\x10\x11"), Typed::Input(b"\x10\x11".to_vec()));
    }
}
