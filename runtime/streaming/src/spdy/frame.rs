//! Frames of SPDY/3.1.
//!
//! ```text
//! control  1 bit 1, 15 bits version 3, 16 bits type, 8 bits flags, 24 bits length, body
//! data     1 bit 0, 31 bits stream id,               8 bits flags, 24 bits length, body
//! ```
//! A control frame is read whole and is at most [`MAX_CONTROL_BYTES`] long. Data comes in pieces as
//! they arrive, so the length of a data frame costs nothing.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::ProtocolError;
use super::header_block::{Deflater, Headers, Inflater};

/// The longest body of a control frame, in bytes. Clients of the CRI send less than 200.
pub const MAX_CONTROL_BYTES: usize = 4 * 1024;

/// The longest body of a data frame that is written, in bytes; the format allows 2^24 - 1.
pub const MAX_DATA_BYTES: usize = 64 * 1024;

const HEAD: usize = 8;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;
const STREAM_ID: u32 = 0x7fff_ffff;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Why a stream is reset: the status codes of RST_STREAM that are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ResetStatus {
    /// The peer violated the protocol.
    ProtocolError = 1,
    /// Data for a stream that is not open.
    InvalidStream = 2,
    /// The stream is not wanted.
    RefusedStream = 3,
    /// The stream has ended.
    Cancel = 5,
    /// The peer sent more than is taken.
    FlowControlError = 7,
}

/// A frame, or a piece of a data frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The peer opens a stream.
    SynStream {
        /// Its id.
        stream: u32,
        /// Its headers.
        headers: Headers,
        /// The peer will send no data on it.
        last: bool,
        /// No answer on it is expected.
        unidirectional: bool,
    },
    /// The peer accepts a stream.
    SynReply {
        /// Its id.
        stream: u32,
        /// The answer's headers.
        headers: Headers,
        /// The peer will send no data on it.
        last: bool,
    },
    /// The peer gives a stream up.
    Reset {
        /// Its id.
        stream: u32,
        /// The status code.
        status: u32,
    },
    /// To be answered with the same id.
    Ping(u32),
    /// The peer will open no more streams.
    GoAway,
    /// More headers for a stream.
    Headers {
        /// Its id.
        stream: u32,
        /// The headers.
        headers: Headers,
        /// The peer will send no more data on it.
        last: bool,
    },
    /// A frame that is ignored: settings, window updates, types that are unknown.
    Ignored,
    /// Data of a stream.
    Data {
        /// Its id.
        stream: u32,
        /// The data; may be empty only with `last`.
        bytes: Bytes,
        /// The peer will send no more data on it.
        last: bool,
    },
}

/// Reads frames from bytes as they arrive.
#[derive(Debug)]
pub struct Decoder {
    /// `None` when header blocks are no longer read.
    inflater: Option<Inflater>,
    /// The data frame that is being read.
    data: Option<DataFrame>,
}

#[derive(Debug)]
struct DataFrame {
    stream: u32,
    left: usize,
    last: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflater: Some(Inflater::default()), data: None }
    }
}

impl Decoder {
    /// Stops reading header blocks: they count as empty. The memory for decompressing them, 40 KiB,
    /// is freed.
    pub fn forget_headers(&mut self) {
        self.inflater = None;
    }

    /// Whether more follows of the data frame that the last piece was from.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn is_inside_data(&self) -> bool {
        self.data.is_some()
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, ProtocolError> {
        self.inflater.as_mut().map_or_else(|| Ok(Headers::default()), |inflater| inflater.read(block))
    }

    /// Takes the next frame, or piece of data, off the front of `buffer`; `None` when more bytes
    /// are needed. `buffer` never has to hold more than 8 bytes and [`MAX_CONTROL_BYTES`].
    ///
    /// # Errors
    /// [`ProtocolError`]; the connection is unusable then.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, ProtocolError> {
        if let Some(data) = &mut self.data {
            return Ok(data.piece(buffer).inspect(|frame| {
                if let Frame::Data { .. } = frame
                    && self.data.as_ref().is_some_and(|data| data.left == 0)
                {
                    self.data = None;
                }
            }));
        }
        let Some(head) = buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let [first, second, third, fourth, flags, a, b, c] = *head;
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
        let word = u32::from_be_bytes([first, second, third, fourth]);
        if word & !STREAM_ID == 0 {
            if flags & !FLAG_FIN != 0 || word == 0 {
                return Err(ProtocolError::Malformed("DATA"));
            }
            buffer.advance(HEAD);
            let last = flags & FLAG_FIN != 0;
            if length == 0 {
                let empty = Frame::Data { stream: word, bytes: Bytes::new(), last };
                return Ok(Some(if last { empty } else { Frame::Ignored }));
            }
            self.data = Some(DataFrame { stream: word, left: length, last });
            return self.next(buffer);
        }
        let version = u16::from_be_bytes([first & 0x7f, second]);
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(ProtocolError::TooLong(length));
        }
        if buffer.len() < HEAD + length {
            return Ok(None);
        }
        buffer.advance(HEAD);
        let body = buffer.split_to(length).freeze();
        self.control(u16::from_be_bytes([third, fourth]), flags, body).map(Some)
    }

    fn control(&mut self, kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, ProtocolError> {
        let last = flags & FLAG_FIN != 0;
        match kind {
            SYN_STREAM => {
                let malformed = ProtocolError::Malformed("SYN_STREAM");
                if flags & !(FLAG_FIN | FLAG_UNIDIRECTIONAL) != 0 {
                    return Err(malformed);
                }
                let stream = stream_id(&mut body).ok_or(malformed)?;
                // The associated stream, and a byte each for priority and credential slot.
                if body.len() < 6 {
                    return Err(malformed);
                }
                body.advance(6);
                let headers = self.headers(&body)?;
                Ok(Frame::SynStream {
                    stream,
                    headers,
                    last,
                    unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                })
            }
            SYN_REPLY | HEADERS => {
                let malformed =
                    ProtocolError::Malformed(if kind == HEADERS { "HEADERS" } else { "SYN_REPLY" });
                if flags & !FLAG_FIN != 0 {
                    return Err(malformed);
                }
                let stream = stream_id(&mut body).ok_or(malformed)?;
                let headers = self.headers(&body)?;
                Ok(match kind {
                    HEADERS => Frame::Headers { stream, headers, last },
                    _ => Frame::SynReply { stream, headers, last },
                })
            }
            RST_STREAM => {
                let malformed = ProtocolError::Malformed("RST_STREAM");
                let stream = stream_id(&mut body).ok_or(malformed)?;
                let status = exactly_one_number(&mut body).ok_or(malformed)?;
                Ok(Frame::Reset { stream, status })
            }
            PING => exactly_one_number(&mut body).map(Frame::Ping).ok_or(ProtocolError::Malformed("PING")),
            GOAWAY if body.len() == 8 => Ok(Frame::GoAway),
            GOAWAY => Err(ProtocolError::Malformed("GOAWAY")),
            SETTINGS => {
                let count = body.try_get_u32().ok().and_then(|count| usize::try_from(count).ok());
                match count.and_then(|count| count.checked_mul(8)) {
                    Some(length) if length == body.len() => Ok(Frame::Ignored),
                    _ => Err(ProtocolError::Malformed("SETTINGS")),
                }
            }
            WINDOW_UPDATE if body.len() == 8 => Ok(Frame::Ignored),
            WINDOW_UPDATE => Err(ProtocolError::Malformed("WINDOW_UPDATE")),
            _ => Ok(Frame::Ignored),
        }
    }
}

impl DataFrame {
    fn piece(&mut self, buffer: &mut BytesMut) -> Option<Frame> {
        if buffer.is_empty() {
            return None;
        }
        let bytes = buffer.split_to(self.left.min(buffer.len())).freeze();
        self.left -= bytes.len();
        Some(Frame::Data { stream: self.stream, bytes, last: self.last && self.left == 0 })
    }
}

fn stream_id(body: &mut Bytes) -> Option<u32> {
    body.try_get_u32().ok().map(|word| word & STREAM_ID).filter(|stream| *stream != 0)
}

fn exactly_one_number(body: &mut Bytes) -> Option<u32> {
    body.try_get_u32().ok().filter(|_| body.is_empty())
}

/// Writes frames as bytes.
#[derive(Debug, Default)]
pub struct Encoder {
    deflater: Deflater,
}

impl Encoder {
    /// SYN_STREAM.
    pub fn syn_stream(&mut self, stream: u32, headers: &Headers, to: &mut BytesMut) {
        let block = self.deflater.write(headers);
        control(to, SYN_STREAM, 10 + block.len());
        to.put_u32(stream);
        to.put_u32(0);
        to.put_u16(0);
        to.put_slice(&block);
    }

    /// SYN_REPLY without headers.
    pub fn syn_reply(&mut self, stream: u32, to: &mut BytesMut) {
        let block = self.deflater.write(&Headers::default());
        control(to, SYN_REPLY, 4 + block.len());
        to.put_u32(stream);
        to.put_slice(&block);
    }

    /// RST_STREAM.
    pub fn reset(stream: u32, status: ResetStatus, to: &mut BytesMut) {
        control(to, RST_STREAM, 8);
        to.put_u32(stream);
        to.put_u32(status as u32);
    }

    /// PING.
    pub fn ping(id: u32, to: &mut BytesMut) {
        control(to, PING, 4);
        to.put_u32(id);
    }

    /// GOAWAY with status 0 (OK): `stream` is the last one of the peer's that was processed.
    pub fn go_away(stream: u32, to: &mut BytesMut) {
        control(to, GOAWAY, 8);
        to.put_u32(stream);
        to.put_u32(0);
    }

    /// The head of a data frame with `length` bytes, at most [`MAX_DATA_BYTES`], which have to
    /// follow.
    pub fn data(stream: u32, length: usize, last: bool, to: &mut BytesMut) {
        to.put_u32(stream & STREAM_ID);
        put_flags_and_length(to, if last { FLAG_FIN } else { 0 }, length);
    }
}

fn control(to: &mut BytesMut, kind: u16, length: usize) {
    to.put_u16(0x8000 | VERSION);
    to.put_u16(kind);
    put_flags_and_length(to, 0, length);
}

fn put_flags_and_length(to: &mut BytesMut, flags: u8, length: usize) {
    let [_, a, b, c] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    to.put_slice(&[flags, a, b, c]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads `bytes` in pieces of `size`, as many frames as come, with adjacent pieces of data
    /// joined.
    fn read(bytes: &[u8], size: usize) -> (Vec<Frame>, Result<(), ProtocolError>) {
        let (mut decoder, mut buffer, mut frames) = (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(size.max(1)) {
            buffer.extend_from_slice(piece);
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(frame)) => join(&mut frames, frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Err(error)),
                }
            }
            assert!(buffer.len() < HEAD + MAX_CONTROL_BYTES + size, "it holds on to {}", buffer.len());
        }
        (frames, Ok(()))
    }

    fn join(frames: &mut Vec<Frame>, next: Frame) {
        if let (
            Some(Frame::Data { stream, bytes, last }),
            Frame::Data { stream: same, bytes: more, last: end },
        ) = (frames.last_mut(), &next)
            && stream == same
            && !*last
        {
            *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
            *last = *end;
            return;
        }
        frames.push(next);
    }

    fn written() -> Vec<u8> {
        let (mut encoder, mut to) = (Encoder::default(), BytesMut::new());
        encoder.syn_stream(1, &Headers::of(&[("streamType", "error")]), &mut to);
        encoder.syn_stream(3, &Headers::of(&[("streamType", "stdin"), ("x", "y")]), &mut to);
        encoder.syn_reply(1, &mut to);
        Encoder::data(3, 5, false, &mut to);
        to.put_slice(b"hello");
        Encoder::data(1, 0, true, &mut to);
        Encoder::ping(7, &mut to);
        Encoder::reset(3, ResetStatus::Cancel, &mut to);
        Encoder::go_away(3, &mut to);
        to.to_vec()
    }

    #[test]
    fn frames_come_back_whatever_the_pieces() {
        let bytes = written();
        let expected = vec![
            Frame::SynStream {
                stream: 1,
                headers: Headers::of(&[("streamtype", "error")]),
                last: false,
                unidirectional: false,
            },
            Frame::SynStream {
                stream: 3,
                headers: Headers::of(&[("streamtype", "stdin"), ("x", "y")]),
                last: false,
                unidirectional: false,
            },
            Frame::SynReply { stream: 1, headers: Headers::default(), last: false },
            Frame::Data { stream: 3, bytes: Bytes::from_static(b"hello"), last: false },
            Frame::Data { stream: 1, bytes: Bytes::new(), last: true },
            Frame::Ping(7),
            Frame::Reset { stream: 3, status: 5 },
            Frame::GoAway,
        ];
        for size in 1..=bytes.len() {
            assert_eq!(read(&bytes, size), (expected.clone(), Ok(())), "pieces of {size}");
        }
    }

    #[test]
    fn frames_that_cannot_be_are_refused() {
        let control = |kind: u8, flags: u8, body: &[u8]| {
            let length = u8::try_from(body.len()).unwrap();
            [&[0x80, 3, 0, kind, flags, 0, 0, length], body].concat()
        };
        for (bytes, error) in [
            (vec![0x80, 2, 0, 1, 0, 0, 0, 0], ProtocolError::Version(2)),
            (vec![0x80, 3, 0, 4, 0, 0xff, 0xff, 0xff], ProtocolError::TooLong(0x00ff_ffff)),
            (vec![0, 0, 0, 0, 0, 0, 0, 1], ProtocolError::Malformed("DATA")),
            (vec![0, 0, 0, 1, 2, 0, 0, 1], ProtocolError::Malformed("DATA")),
            (control(1, 4, &[0; 10]), ProtocolError::Malformed("SYN_STREAM")),
            (control(1, 0, &[0, 0, 0, 1, 0, 0, 0, 0, 0]), ProtocolError::Malformed("SYN_STREAM")),
            (control(1, 0, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]), ProtocolError::Malformed("SYN_STREAM")),
            (control(2, 0, &[0, 0]), ProtocolError::Malformed("SYN_REPLY")),
            (control(3, 0, &[0, 0, 0, 1]), ProtocolError::Malformed("RST_STREAM")),
            // CVE-2026-35469: a count that exceeds the data.
            (control(4, 0, &[0xff, 0xff, 0xff, 0xff]), ProtocolError::Malformed("SETTINGS")),
            (control(4, 0, &[0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1]), ProtocolError::Malformed("SETTINGS")),
            (control(6, 0, &[0; 5]), ProtocolError::Malformed("PING")),
            (control(7, 0, &[0; 4]), ProtocolError::Malformed("GOAWAY")),
            (control(9, 0, &[0; 4]), ProtocolError::Malformed("WINDOW_UPDATE")),
        ] {
            assert_eq!(read(&bytes, 1000), (Vec::new(), Err(error)), "{bytes:?}");
        }
        for ignored in [control(4, 0, &[0; 4]), control(9, 0, &[0; 8]), control(10, 7, &[1, 2, 3])] {
            assert_eq!(read(&ignored, 3), (vec![Frame::Ignored], Ok(())), "{ignored:?}");
        }
    }

    #[test]
    fn a_long_data_frame_is_passed_on_as_it_comes() {
        let mut bytes = BytesMut::new();
        Encoder::data(1, 0x00ff_ffff, true, &mut bytes);
        let mut decoder = Decoder::default();
        assert_eq!(decoder.next(&mut bytes), Ok(None));
        bytes.extend_from_slice(b"abc");
        let piece = Frame::Data { stream: 1, bytes: Bytes::from_static(b"abc"), last: false };
        assert_eq!(decoder.next(&mut bytes), Ok(Some(piece)));
        assert!(bytes.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_the_same_in_pieces(
            bytes in prop::collection::vec(any::<u8>(), 0..200), size in 1..50usize)
        {
            prop_assert_eq!(read(&bytes, size), read(&bytes, 1000));
        }

        #[test]
        fn damaged_frames_are_read_or_refused_the_same_in_pieces(
            place in 0..200usize, value in any::<u8>(), cut in 0..300usize, size in 1..50usize)
        {
            let mut bytes = written();
            let length = bytes.len();
            bytes[place % length] = value;
            bytes.truncate(cut.max(1));
            prop_assert_eq!(read(&bytes, size), read(&bytes, 1000));
        }
    }
}
