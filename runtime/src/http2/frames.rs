//! Finds the header blocks in the frames of a client (RFC 9113 section 4), and puts rewritten ones
//! in their place.
//!
//! A block is assembled from its `HEADERS` and `CONTINUATION` frames, without their padding, and
//! sent in as few frames as possible. All other frames are passed on unchanged, and so is anything
//! that is not HTTP/2: the server handles it.

use super::header_block::{BadBlock, Rewriter, Rewritten};
use super::{MAX_FRAME, MAX_HEADER_LIST};

/// The connection preface of a client (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The head of a frame, in bytes: length, type, flags, stream (RFC 9113 section 4.1).
const HEAD: usize = 9;

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;

const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The dependency and weight of a stream in a `HEADERS` frame, in bytes (RFC 9113 section 6.2).
const PRIORITY_LENGTH: usize = 5;

const FRAME: usize = MAX_FRAME as usize;

/// The largest encoded block, in bytes. One within [`MAX_HEADER_LIST`] is smaller; one a few times
/// larger is still answered with 431.
const MAX_BLOCK: usize = 4 * MAX_HEADER_LIST as usize;

/// The most `CONTINUATION` frames of one block: [`MAX_BLOCK`] in full frames, and as many again.
/// Empty ones could continue forever.
const MAX_CONTINUATIONS: u32 = 8;

/// A block that every server refuses: index 0 is invalid (RFC 7541 section 6.1).
const REFUSED_BLOCK: u8 = 0x80;

/// Why a client's connection has to end: its header state is lost (RFC 9113 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("a header block has more than {MAX_BLOCK} bytes, or more than {MAX_CONTINUATIONS} continuations")]
    Block,
    #[error("invalid frame sequence: {0}")]
    Frames(&'static str),
    #[error(transparent)]
    Headers(#[from] BadBlock),
}

/// The position in a client's frames.
#[derive(Debug)]
enum Place {
    /// Within the preface, at this byte.
    Preface(usize),
    /// At a frame's head, or in it.
    Head,
    /// In the payload of a frame that is passed on unchanged, with this many bytes left.
    Passing(usize),
    /// In the payload of a frame with part of a header block, of this many bytes.
    Part(usize),
    /// Not HTTP/2.
    Foreign,
}

/// An incomplete header block.
#[derive(Debug)]
struct Block {
    /// Flags of its `HEADERS` frame, and then the stream, as they were on the wire.
    flags: u8,
    stream: [u8; 4],
    /// The bytes of the frame's priority, if it has one.
    priority: Vec<u8>,
    fragment: Vec<u8>,
    continuations: u32,
}

/// The frames of one client.
#[derive(Debug)]
pub(super) struct Frames {
    place: Place,
    /// The received part of the current head and, in [`Place::Part`], of its payload.
    seen: Vec<u8>,
    block: Option<Block>,
    rewriter: Rewriter,
    /// Why reading has stopped.
    end: Option<Refused>,
    /// The stream whose headers were too large for the server.
    too_large: Option<u32>,
    /// Output for the server.
    pub(super) output: Vec<u8>,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            place: Place::Preface(0),
            seen: Vec::new(),
            block: None,
            rewriter: Rewriter::default(),
            end: None,
            too_large: None,
            output: Vec::new(),
        }
    }
}

impl Frames {
    /// Why the connection has to end.
    pub(super) fn end(&self) -> Option<Refused> {
        self.end
    }

    /// A stream whose headers were larger than [`MAX_HEADER_LIST`]. The server answers it, and it
    /// is reset once.
    pub(super) fn take_too_large(&mut self) -> Option<u32> {
        self.too_large.take()
    }

    /// The allocated memory, in bytes.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.seen.capacity()
    }

    /// How many of the first bytes of `input` are passed on unchanged. They count as read.
    pub(super) fn pass(&mut self, input: &[u8]) -> usize {
        let mut passed = 0;
        while let Some(rest) = input.get(passed..).filter(|rest| !rest.is_empty()) {
            match &mut self.place {
                Place::Foreign => return input.len(),
                Place::Preface(at) => {
                    let wanted = PREFACE.get(*at..).unwrap_or_default();
                    let length = wanted.len().min(rest.len());
                    if rest.get(..length) != wanted.get(..length) {
                        self.place = Place::Foreign;
                        continue;
                    }
                    passed += length;
                    *at += length;
                    if *at == PREFACE.len() {
                        self.place = Place::Head;
                    }
                }
                Place::Passing(left) => {
                    let length = (*left).min(rest.len());
                    passed += length;
                    *left -= length;
                    if *left == 0 {
                        self.place = Place::Head;
                    }
                }
                Place::Head => {
                    let Some(head) = rest.first_chunk().filter(|_| self.seen.is_empty()).map(Head::of) else {
                        return passed;
                    };
                    if self.block.is_some() || head.has_headers() {
                        return passed;
                    }
                    passed += HEAD;
                    self.place = if head.length > 0 { Place::Passing(head.length) } else { Place::Head };
                }
                Place::Part(_) => return passed,
            }
        }
        passed
    }

    /// Reads `input`, and appends the server's part of it to the output.
    pub(super) fn feed(&mut self, mut input: &[u8]) {
        while !input.is_empty() && self.end.is_none() {
            let passed = self.pass(input);
            let (as_it_is, rest) = input.split_at(passed);
            self.output.extend_from_slice(as_it_is);
            input = rest;
            let wanted = match self.place {
                Place::Part(length) => HEAD + length,
                _ => HEAD,
            };
            let length = (wanted - self.seen.len()).min(input.len());
            let (now, rest) = input.split_at(length);
            self.seen.extend_from_slice(now);
            input = rest;
            if self.seen.len() == wanted && wanted >= HEAD {
                self.complete();
            }
        }
    }

    /// Processes a complete head or payload.
    fn complete(&mut self) {
        let Some(head) = self.seen.first_chunk().map(Head::of) else { return };
        if matches!(self.place, Place::Head) {
            let of_the_block = self
                .block
                .as_ref()
                .is_none_or(|block| head.kind == CONTINUATION && head.stream == block.stream);
            if !of_the_block {
                return self.refuse(head.stream, Refused::Frames("another frame inside a header block"));
            }
            if self.block.is_none() && !head.has_headers() {
                self.output.append(&mut self.seen);
                self.place = if head.length > 0 { Place::Passing(head.length) } else { Place::Head };
                return;
            }
            if head.kind == CONTINUATION && self.block.is_none() {
                return self.refuse(head.stream, Refused::Frames("a continuation without a header block"));
            }
            if head.length > FRAME {
                return self
                    .refuse(head.stream, Refused::Frames("a frame is larger than the announced maximum"));
            }
            self.place = Place::Part(head.length);
            if head.length > 0 {
                return;
            }
        }
        let seen = std::mem::take(&mut self.seen);
        self.place = Place::Head;
        let result = self.part(&head, seen.get(HEAD..).unwrap_or_default());
        if let Err(why) = result {
            self.refuse(head.stream, why);
        }
        self.seen = seen;
        self.seen.clear();
        self.seen.shrink_to(super::KEEP);
    }

    /// Adds the payload of a frame with part of a header block.
    fn part(&mut self, head: &Head, payload: &[u8]) -> Result<(), Refused> {
        let block = match self.block.take() {
            Some(mut block) => {
                block.continuations += 1;
                block.fragment.extend_from_slice(payload);
                block
            }
            None => Block::begin(head, payload)?,
        };
        if block.fragment.len() > MAX_BLOCK || block.continuations > MAX_CONTINUATIONS {
            return Err(Refused::Block);
        }
        if head.flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        self.write(&block)
    }

    /// Writes a complete block in new frames.
    fn write(&mut self, block: &Block) -> Result<(), Refused> {
        let begin = self.output.len();
        self.output.resize(begin + HEAD, 0);
        self.output.extend_from_slice(&block.priority);
        let rewritten = match self.rewriter.rewrite(&block.fragment, &mut self.output) {
            Ok(rewritten) => rewritten,
            Err(why) => {
                self.output.truncate(begin);
                return Err(why.into());
            }
        };
        if rewritten == Rewritten::TooLarge {
            self.too_large = Some(u32::from_be_bytes(block.stream));
        }
        let flags = block.flags & !(PADDED | END_HEADERS);
        // Nearly always one frame, which is already in place.
        let rest = self.output.split_off(self.output.len().min(begin + HEAD + FRAME));
        let last = if rest.is_empty() { END_HEADERS } else { 0 };
        let length = self.output.len() - begin - HEAD;
        if let Some(place) = self.output.get_mut(begin..begin + HEAD) {
            place.copy_from_slice(&head(length, HEADERS, flags | last, block.stream));
        }
        let mut parts = rest.chunks(FRAME).peekable();
        while let Some(part) = parts.next() {
            let last = if parts.peek().is_none() { END_HEADERS } else { 0 };
            self.output.extend_from_slice(&head(part.len(), CONTINUATION, last, block.stream));
            self.output.extend_from_slice(part);
        }
        Ok(())
    }

    /// Sends the server a block that makes it close the connection properly, and ends the input.
    fn refuse(&mut self, stream: [u8; 4], why: Refused) {
        self.end = Some(why);
        self.seen.clear();
        self.output.extend_from_slice(&head(1, HEADERS, END_HEADERS, stream));
        self.output.push(REFUSED_BLOCK);
    }
}

impl Block {
    /// Reads the payload of a `HEADERS` frame (RFC 9113 section 6.2).
    fn begin(head: &Head, mut payload: &[u8]) -> Result<Self, Refused> {
        let wrong = Refused::Frames("a HEADERS frame is shorter than its padding and priority");
        if head.flags & PADDED != 0 {
            let (padding, rest) = payload.split_first().ok_or(wrong)?;
            let length = rest.len().checked_sub(usize::from(*padding)).ok_or(wrong)?;
            payload = rest.get(..length).ok_or(wrong)?;
        }
        let mut priority = &[][..];
        if head.flags & PRIORITY != 0 {
            (priority, payload) = payload.split_at_checked(PRIORITY_LENGTH).ok_or(wrong)?;
        }
        Ok(Self {
            flags: head.flags,
            stream: head.stream,
            priority: priority.to_vec(),
            fragment: payload.to_vec(),
            continuations: 0,
        })
    }
}

/// The head of a frame.
#[derive(Debug, Clone, Copy)]
struct Head {
    /// Length of the payload, in bytes.
    length: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

impl Head {
    fn of(&[l0, l1, l2, kind, flags, s0, s1, s2, s3]: &[u8; HEAD]) -> Self {
        let length = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        Self { length, kind, flags, stream: [s0, s1, s2, s3] }
    }

    fn has_headers(&self) -> bool {
        self.kind == HEADERS || self.kind == CONTINUATION
    }
}

/// The head of a frame with a payload of `length` bytes, at most [`FRAME`].
fn head(length: usize, kind: u8, flags: u8, [s0, s1, s2, s3]: [u8; 4]) -> [u8; HEAD] {
    let [.., l0, l1, l2] = length.to_be_bytes();
    [l0, l1, l2, kind, flags, s0, s1, s2, s3]
}
