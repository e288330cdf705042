//! Header blocks: name/value pairs, compressed by one zlib stream per direction that lives as long
//! as the connection.
//!
//! ```text
//! u32  number of pairs
//!      u32 length, name (lower case)      repeated
//!      u32 length, value
//! ```
//! Numbers are big-endian (SPDY protocol draft 3, section 2.6.10). Decompression stops at
//! [`MAX_BYTES`], whatever the compressed length.

use flate2::{Decompress, FlushDecompress, Status};

use super::ProtocolError;
use super::dictionary::DICTIONARY;

/// The longest header block, decompressed, in bytes. Clients of the CRI send some 100:
/// `streamType`, `port` and `requestID`. Each stream keeps its own block.
pub const MAX_BYTES: usize = 2 * 1024;

/// The most pairs in a block.
pub const MAX_PAIRS: usize = 32;

/// Names and values. Names are lower case and unique.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// These pairs; names are converted to lower case.
    #[must_use]
    pub fn of(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(name, value)| (name.to_ascii_lowercase(), (*value).to_owned())).collect())
    }

    /// The value of a header, by its lower-case name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The block's bytes before compression.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_number(&mut bytes, self.0.len());
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            put_number(&mut bytes, text.len());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    /// The pairs in a decompressed block.
    ///
    /// # Errors
    /// When a length does not fit, there are too many pairs, a name is empty, in upper case or
    /// repeated, or text is not UTF-8.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, ProtocolError> {
        let count = take_number(&mut bytes)?;
        if count > MAX_PAIRS {
            return Err(ProtocolError::HeadersTooLarge);
        }
        let mut headers = Self(Vec::with_capacity(count));
        for _ in 0..count {
            let (name, value) = (take_text(&mut bytes)?, take_text(&mut bytes)?);
            let well_formed = !name.is_empty() && !name.bytes().any(|byte| byte.is_ascii_uppercase());
            if !well_formed || headers.get(&name).is_some() {
                return Err(ProtocolError::Headers);
            }
            headers.0.push((name, value));
        }
        if bytes.is_empty() { Ok(headers) } else { Err(ProtocolError::Headers) }
    }
}

fn put_number(bytes: &mut Vec<u8>, number: usize) {
    bytes.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes());
}

fn take_number(bytes: &mut &[u8]) -> Result<usize, ProtocolError> {
    let (number, rest) = bytes.split_first_chunk::<4>().ok_or(ProtocolError::Headers)?;
    *bytes = rest;
    usize::try_from(u32::from_be_bytes(*number)).map_err(|_| ProtocolError::Headers)
}

fn take_text(bytes: &mut &[u8]) -> Result<String, ProtocolError> {
    let length = take_number(bytes)?;
    let (text, rest) = bytes.split_at_checked(length).ok_or(ProtocolError::Headers)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).map_err(|_| ProtocolError::Headers)
}

/// Decompresses the header blocks of one direction, in their order.
#[derive(Debug)]
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// Decompresses and decodes the next block.
    ///
    /// # Errors
    /// [`ProtocolError`]; later blocks cannot be read after that.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, ProtocolError> {
        let mut decompressed = Vec::with_capacity(MAX_BYTES + 1);
        let mut rest = block;
        loop {
            let (read_before, had) = (self.0.total_in(), decompressed.len());
            let result = self.0.decompress_vec(rest, &mut decompressed, FlushDecompress::Sync);
            let read = usize::try_from(self.0.total_in() - read_before).unwrap_or(usize::MAX);
            rest = rest.get(read..).unwrap_or_default();
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    // The stream names another dictionary when this fails.
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| ProtocolError::Compression)?;
                    continue;
                }
                Err(_) => return Err(ProtocolError::Compression),
                // A stream that ends has no room for the next block; no peer ends it.
                Ok(Status::StreamEnd) => return Err(ProtocolError::Compression),
                Ok(Status::Ok | Status::BufError) => {}
            }
            if decompressed.len() > MAX_BYTES {
                return Err(ProtocolError::HeadersTooLarge);
            }
            if read == 0 && decompressed.len() == had {
                break;
            }
        }
        if rest.is_empty() { Headers::decode(&decompressed) } else { Err(ProtocolError::Compression) }
    }
}

/// The first bytes of a zlib stream: deflate with a window of 32 KiB, and with a dictionary (RFC
/// 1950).
const ZLIB_HEAD: u16 = 0x78bb;

/// Writes the header blocks of one direction, in their order.
///
/// A block of ours has some bytes, and in a server's answers none at all. So blocks are stored and
/// not compressed: a compressor would take 270 KiB for each connection.
#[derive(Debug, Default)]
pub struct Deflater {
    begun: bool,
}

impl Deflater {
    /// Encodes the next block.
    pub fn write(&mut self, headers: &Headers) -> Vec<u8> {
        let plain = headers.encode();
        let mut block = Vec::with_capacity(plain.len() + 16);
        if !self.begun {
            block.extend_from_slice(&ZLIB_HEAD.to_be_bytes());
            block.extend_from_slice(&adler32(&DICTIONARY).to_be_bytes());
            self.begun = true;
        }
        // RFC 1951, section 3.2.4.
        for stored in plain.chunks(usize::from(u16::MAX)) {
            let length = u16::try_from(stored.len()).unwrap_or(u16::MAX);
            block.push(0);
            block.extend_from_slice(&length.to_le_bytes());
            block.extend_from_slice(&(!length).to_le_bytes());
            block.extend_from_slice(stored);
        }
        // The end of a block is marked by an empty one, as by zlib's sync flush: Go's decompressor
        // holds back what it has read until then.
        block.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        block
    }
}

/// The checksum of RFC 1950, section 8.2, by which a stream names its dictionary.
fn adler32(bytes: &[u8]) -> u32 {
    const BASE: u32 = 65_521;
    let (a, b) = bytes.iter().fold((1, 0), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % BASE;
        (a, (b + a) % BASE)
    });
    (b << 16) | a
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    fn compressed(plain: &[u8]) -> Vec<u8> {
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(&DICTIONARY).unwrap();
        let mut bytes = Vec::with_capacity(plain.len() + 1024);
        compress.compress_vec(plain, &mut bytes, FlushCompress::Sync).unwrap();
        bytes
    }

    proptest! {
        #[test]
        fn blocks_come_back_one_after_the_other(blocks in prop::collection::vec(
            prop::collection::btree_map("[a-z]{1,12}", "[ -~]{0,60}", 0..20), 1..8))
        {
            let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
            for block in blocks {
                let headers = Headers(block.into_iter().collect());
                let bytes = deflater.write(&headers);
                prop_assert_eq!(inflater.read(&bytes).unwrap(), headers);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Inflater::default().read(&bytes);
            let _ = Inflater::default().read(&compressed(&bytes));
            if let Ok(headers) = Headers::decode(&bytes) {
                prop_assert_eq!(headers.encode(), bytes);
            }
        }
    }

    #[test]
    fn what_a_few_bytes_can_blow_up_to_is_bounded() {
        // 16 MiB of zeros are 16 KiB compressed.
        let bomb = compressed(&vec![0; 16 * 1024 * 1024]);
        assert!(bomb.len() < 32 * 1024);
        assert_eq!(Inflater::default().read(&bomb), Err(ProtocolError::HeadersTooLarge));
        let long = Headers::of(&[("a", &"x".repeat(MAX_BYTES))]);
        let block = Deflater::default().write(&long);
        assert_eq!(Inflater::default().read(&block), Err(ProtocolError::HeadersTooLarge));
    }

    #[test]
    fn counts_and_lengths_are_checked_before_they_are_believed() {
        let number = |value: u32| value.to_be_bytes().to_vec();
        let pair = |name: &str, value: &str| {
            [
                number(u32::try_from(name.len()).unwrap()),
                name.into(),
                number(u32::try_from(value.len()).unwrap()),
                value.into(),
            ]
            .concat()
        };
        for (bytes, error) in [
            (number(u32::MAX), ProtocolError::HeadersTooLarge),
            ([number(1), number(u32::MAX)].concat(), ProtocolError::Headers),
            (number(1), ProtocolError::Headers),
            (vec![0, 0], ProtocolError::Headers),
            ([number(0), vec![0]].concat(), ProtocolError::Headers),
            ([number(1), pair("", "x")].concat(), ProtocolError::Headers),
            ([number(1), pair("StreamType", "x")].concat(), ProtocolError::Headers),
            ([number(2), pair("a", "x"), pair("a", "y")].concat(), ProtocolError::Headers),
        ] {
            assert_eq!(Headers::decode(&bytes), Err(error), "{bytes:?}");
        }
    }

    #[test]
    fn a_stream_without_the_dictionary_or_with_an_end_is_refused() {
        let mut end = Vec::with_capacity(100);
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(&DICTIONARY).unwrap();
        compress.compress_vec(&[0; 4], &mut end, FlushCompress::Finish).unwrap();
        assert_eq!(Inflater::default().read(&end), Err(ProtocolError::Compression));
        let mut other = Vec::with_capacity(100);
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(b"another dictionary").unwrap();
        compress.compress_vec(&[0; 4], &mut other, FlushCompress::Sync).unwrap();
        assert_eq!(Inflater::default().read(&other), Err(ProtocolError::Compression));
    }
}
