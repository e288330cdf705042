//! Finds refused streams and connections in the output of the HTTP/2 server.
//!
//! The server reports those to the client only: by `RST_STREAM`, or by `GOAWAY` with an error (RFC
//! 9113 sections 6.4, 6.8 and 7).

/// The head of a frame, in bytes: length, type, flags, stream (RFC 9113 section 4.1).
const HEAD: usize = 9;

const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;

/// Errors that say nothing about the client's frames: no error, internal error, a frame that
/// crossed the stream's end, cancelled.
const NOT_REFUSED: [u32; 4] = [0x0, 0x2, 0x5, 0x8];

/// A refusal of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    /// One request. `code` is an error code of RFC 9113 section 7.
    Stream { stream: u32, code: u32 },
    /// The connection.
    Connection { code: u32 },
}

/// The position in the frames of the server.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// The received part of the head and the beginning of the payload.
    seen: [u8; HEAD + 8],
    length: usize,
    /// Bytes of the payload to skip.
    skip: usize,
}

impl Resets {
    /// Examines the next bytes, and calls `found` for each refusal in them.
    pub(super) fn watch(&mut self, mut sent: &[u8], mut found: impl FnMut(Reset)) {
        while !sent.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(sent.len());
                self.skip -= skipped;
                sent = sent.get(skipped..).unwrap_or_default();
                continue;
            }
            let wanted = self.wanted();
            let part = (wanted - self.length).min(sent.len());
            let (now, rest) = sent.split_at(part);
            if let Some(room) = self.seen.get_mut(self.length..self.length + part) {
                room.copy_from_slice(now);
            }
            self.length += part;
            sent = rest;
            if self.length == self.wanted() {
                if let Some(reset) = self.reset() {
                    found(reset);
                }
                self.skip = self.payload() - (self.length - HEAD);
                self.length = 0;
            }
        }
    }

    fn number(&self, at: usize) -> u32 {
        let mut number = [0; 4];
        number.copy_from_slice(self.seen.get(at..at + 4).unwrap_or(&[0; 4]));
        u32::from_be_bytes(number)
    }

    fn payload(&self) -> usize {
        usize::try_from(self.number(0) >> 8).unwrap_or_default()
    }

    /// How much of the frame is needed.
    fn wanted(&self) -> usize {
        if self.length < HEAD {
            return HEAD;
        }
        let of_the_payload = match self.seen[3] {
            RST_STREAM => 4,
            GOAWAY => 8,
            _ => 0,
        };
        HEAD + of_the_payload.min(self.payload())
    }

    fn reset(&self) -> Option<Reset> {
        let reset = match (self.seen[3], self.length - HEAD) {
            (RST_STREAM, 4) => Reset::Stream { stream: self.number(5), code: self.number(HEAD) },
            (GOAWAY, 8) => Reset::Connection { code: self.number(HEAD + 4) },
            _ => return None,
        };
        let (Reset::Stream { code, .. } | Reset::Connection { code }) = reset;
        (!NOT_REFUSED.contains(&code)).then_some(reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    #[test]
    fn refusals_are_found_however_the_bytes_are_cut() {
        let sent = [
            frame(4, 0, &[]),
            frame(0, 1, &[3; 300]),
            frame(RST_STREAM, 5, &1_u32.to_be_bytes()),
            frame(RST_STREAM, 7, &8_u32.to_be_bytes()),
            frame(1, 9, &[1, 2, 3]),
            frame(GOAWAY, 0, &[&9_u32.to_be_bytes()[..], &11_u32.to_be_bytes(), b"too much"].concat()),
            frame(GOAWAY, 0, &[0; 8]),
            frame(RST_STREAM, 11, &7_u32.to_be_bytes()),
        ]
        .concat();
        let expected = [
            Reset::Stream { stream: 5, code: 1 },
            Reset::Connection { code: 11 },
            Reset::Stream { stream: 11, code: 7 },
        ];
        for size in 1..sent.len() {
            let (mut resets, mut found) = (Resets::default(), Vec::new());
            for part in sent.chunks(size) {
                resets.watch(part, |reset| found.push(reset));
            }
            assert_eq!(found, expected, "in parts of {size} bytes");
        }
    }
}
