//! Rewrites header blocks (HPACK, RFC 7541): every `:authority` becomes [`AUTHORITY`], everything
//! else stays as it was.
//!
//! A client refers to headers that it sent before by their index in a table that both sides keep.
//! As a replaced value would shift that table, the rewriter keeps it instead of the server, which
//! gets stateless blocks: each header is a reference to the static table or a literal without
//! indexing. Strings are copied as encoded; only their lengths are computed, because the table's
//! entries are evicted by size.

use std::collections::VecDeque;

use super::huffman::decoded_length;

/// The `:authority` of each request: the one that grpc-go sends over a Unix socket.
const AUTHORITY: &str = "localhost";

/// `:authority` as an HPACK string, without and with Huffman coding. Each encoding is unique.
const NAME: &[u8] = b"\x0a:authority";
const NAME_CODED: &[u8] = &[0x88, 0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// [`super::MAX_HEADER_LIST`], as a length.
const MAX_HEADER_LIST: usize = super::MAX_HEADER_LIST as usize;

/// The size of the table, in bytes: the initial value (RFC 9113 section 6.5.2). Our server
/// announces no other.
const TABLE: usize = 4096;

/// The overhead of an entry beside its name and value, in bytes (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;

/// The largest number that is accepted, in bits: far above all valid lengths and indexes.
const NUMBER_BITS: u32 = 28;

/// The static table (RFC 7541 Appendix A), counted from 1.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// The index of `:authority` in the static table.
const STATIC_AUTHORITY: usize = 1;

/// Why a header block cannot be read. The state of the connection is lost with it (RFC 7541 section
/// 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadBlock {
    /// It ends within a header.
    #[error("a header block ends within a header")]
    Short,
    /// A number that is too large.
    #[error("a header block has a number of more than {NUMBER_BITS} bits")]
    Number,
    /// A reference to a missing entry.
    #[error("a header block refers to a header that was not sent or has been evicted")]
    Index,
    /// A table size above the limit.
    #[error("a header block asks for a table of more than {TABLE} bytes")]
    Table,
}

/// How much of a block was rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rewritten {
    /// All of it.
    Whole,
    /// Up to the header that makes it larger than [`MAX_HEADER_LIST`]; the server refuses it for
    /// its size.
    TooLarge,
}

/// A header in the form for the server.
#[derive(Debug)]
struct Header {
    name: Name,
    /// Length of the decoded name, in bytes.
    name_length: usize,
    /// The value as an HPACK string: its length, then the string as the client encoded it.
    value: Box<[u8]>,
    /// Length of the decoded value, in bytes.
    value_length: usize,
}

#[derive(Debug, Clone)]
enum Name {
    /// An index of the static table.
    Static(u8),
    /// An HPACK string.
    Literal(Box<[u8]>),
}

impl Header {
    fn authority() -> Self {
        let mut value = AUTHORITY.as_bytes().to_vec();
        // Shorter than 127 bytes, so the length is one byte.
        value.insert(0, u8::try_from(AUTHORITY.len()).unwrap_or_default());
        Self {
            name: Name::Static(1),
            name_length: ":authority".len(),
            value: value.into(),
            value_length: AUTHORITY.len(),
        }
    }

    /// Writes it as a literal without indexing, with `flag`: 0, or the bit for "never
    /// indexed" (RFC 7541 section 6.2).
    fn write(&self, flag: u8, output: &mut Vec<u8>) {
        match &self.name {
            Name::Static(index @ ..15) => output.push(flag | index),
            Name::Static(index) => output.extend([flag | 15, index - 15]),
            Name::Literal(text) => {
                output.push(flag);
                output.extend_from_slice(text);
            }
        }
        output.extend_from_slice(&self.value);
    }

    fn length(&self) -> usize {
        self.name_length + self.value_length
    }
}

/// The table of one connection, with the limit set by the client.
#[derive(Debug)]
pub(super) struct Rewriter {
    /// The newest first.
    table: VecDeque<Entry>,
    /// Size of all entries, in bytes.
    size: usize,
    limit: usize,
}

#[derive(Debug)]
struct Entry {
    header: Header,
    /// Its size for the client, in bytes. For an `:authority`, this differs from `header`.
    size: usize,
}

impl Default for Rewriter {
    fn default() -> Self {
        Self { table: VecDeque::new(), size: 0, limit: TABLE }
    }
}

impl Rewriter {
    /// Appends `block` to `output`, in a form that needs no table.
    ///
    /// # Errors
    /// [`BadBlock`]. Neither the output nor the rewriter can be used then.
    pub(super) fn rewrite(&mut self, block: &[u8], output: &mut Vec<u8>) -> Result<Rewritten, BadBlock> {
        let mut input = Input { bytes: block };
        let mut list = 0;
        while let Some(first) = input.first() {
            // Past the limit, headers are still read, for the table, but not written.
            let mut unwanted = Vec::new();
            let output = if list < MAX_HEADER_LIST { &mut *output } else { &mut unwanted };
            let length = match first {
                0x80.. => self.indexed(input.number(7)?, output)?,
                0x40.. => {
                    let entry = self.literal(&mut input, 6)?;
                    entry.header.write(0, output);
                    let length = entry.header.length();
                    self.insert(entry);
                    length
                }
                0x20.. => {
                    self.limit =
                        Some(input.number(5)?).filter(|limit| *limit <= TABLE).ok_or(BadBlock::Table)?;
                    self.evict(0);
                    continue;
                }
                _ => {
                    let header = self.literal(&mut input, 4)?.header;
                    header.write(first & 0x10, output);
                    header.length()
                }
            };
            list += length + OVERHEAD;
        }
        Ok(if list < MAX_HEADER_LIST { Rewritten::Whole } else { Rewritten::TooLarge })
    }

    /// Writes the header at `index` of both tables, and returns its length.
    fn indexed(&self, index: usize, output: &mut Vec<u8>) -> Result<usize, BadBlock> {
        if index == STATIC_AUTHORITY {
            let header = Header::authority();
            header.write(0, output);
            return Ok(header.length());
        }
        if let Some((index, (name, value))) = fixed(index) {
            output.push(0x80 | index);
            return Ok(name.len() + value.len());
        }
        let header = &self.kept(index)?.header;
        header.write(0, output);
        Ok(header.length())
    }

    /// The entry at `index`, beyond the static table.
    fn kept(&self, index: usize) -> Result<&Entry, BadBlock> {
        index.checked_sub(STATIC.len() + 1).and_then(|place| self.table.get(place)).ok_or(BadBlock::Index)
    }

    /// Reads a literal whose first number has `prefix` bits.
    fn literal(&self, input: &mut Input<'_>, prefix: u32) -> Result<Entry, BadBlock> {
        let index = input.number(prefix)?;
        let (name, name_length) = if index == 0 {
            let name = input.string()?;
            (Name::Literal(name.whole.into()), name.length)
        } else if let Some((index, (name, _))) = fixed(index) {
            (Name::Static(index), name.len())
        } else {
            let header = &self.kept(index)?.header;
            (header.name.clone(), header.name_length)
        };
        let value = input.string()?;
        let size = name_length + value.length + OVERHEAD;
        let is_authority = match &name {
            Name::Static(index) => usize::from(*index) == STATIC_AUTHORITY,
            Name::Literal(text) => **text == *NAME || **text == *NAME_CODED,
        };
        let header = if is_authority {
            Header::authority()
        } else {
            Header { name, name_length, value: value.whole.into(), value_length: value.length }
        };
        Ok(Entry { header, size })
    }

    fn insert(&mut self, entry: Entry) {
        self.evict(entry.size);
        // One that is larger than the table empties it, and is not added (RFC 7541 section 4.4).
        if entry.size <= self.limit {
            self.size += entry.size;
            self.table.push_front(entry);
        }
    }

    /// Makes room for `size` bytes.
    fn evict(&mut self, size: usize) {
        while self.size + size > self.limit {
            let Some(entry) = self.table.pop_back() else { return };
            self.size -= entry.size;
        }
    }
}

/// The entry of the static table at `index`, with its index as one byte.
fn fixed(index: usize) -> Option<(u8, (&'static str, &'static str))> {
    let entry = STATIC.get(index.checked_sub(1)?)?;
    Some((u8::try_from(index).ok()?, *entry))
}

/// The rest of a block.
#[derive(Debug)]
struct Input<'a> {
    bytes: &'a [u8],
}

/// An HPACK string.
#[derive(Debug)]
struct Text<'a> {
    /// Encoded, with its length in front.
    whole: &'a [u8],
    /// Decoded length, in bytes.
    length: usize,
}

impl<'a> Input<'a> {
    fn first(&self) -> Option<u8> {
        self.bytes.first().copied()
    }

    fn byte(&mut self) -> Result<u8, BadBlock> {
        let (first, rest) = self.bytes.split_first().ok_or(BadBlock::Short)?;
        self.bytes = rest;
        Ok(*first)
    }

    /// Reads a number whose first byte has `prefix` bits for it (RFC 7541 section 5.1).
    fn number(&mut self, prefix: u32) -> Result<usize, BadBlock> {
        let mask = u8::MAX >> (8 - prefix);
        let first = self.byte()? & mask;
        let mut number = usize::from(first);
        if first < mask {
            return Ok(number);
        }
        for shift in (0..NUMBER_BITS).step_by(7) {
            let byte = self.byte()?;
            number += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(BadBlock::Number)
    }

    /// Reads a string (RFC 7541 section 5.2).
    fn string(&mut self) -> Result<Text<'a>, BadBlock> {
        let from = self.bytes;
        let coded = self.first().ok_or(BadBlock::Short)? & 0x80 != 0;
        let length = self.number(7)?;
        let (text, rest) = self.bytes.split_at_checked(length).ok_or(BadBlock::Short)?;
        self.bytes = rest;
        let whole = from.get(..from.len() - rest.len()).ok_or(BadBlock::Short)?;
        Ok(Text { whole, length: if coded { decoded_length(text) } else { length } })
    }
}
