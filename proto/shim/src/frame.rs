//! Frames: a little-endian `u32` length, then that many bytes of one protobuf message.

use prost::Message;

/// The longest message, in bytes. A plan holds at most 1 MiB of arguments and environment, a
/// seccomp filter of 32 KiB and some thousand mounts; changing the number does not change the
/// format.
pub const MAX_LENGTH: usize = 8 * 1024 * 1024;

const PREFIX: usize = 4;

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// The length is over [`MAX_LENGTH`].
    TooLong {
        /// What the prefix said.
        length: usize,
    },
    /// The bytes are not such a message.
    Malformed,
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLong { length } => write!(f, "a message of {length} bytes is longer than {MAX_LENGTH}"),
            Self::Malformed => f.write_str("bytes that are not the expected message"),
        }
    }
}

impl std::error::Error for FrameError {}

/// `message` as one frame.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    let prefix =
        u32::try_from(length).ok().filter(|_| length <= MAX_LENGTH).ok_or(FrameError::TooLong { length })?;
    let mut bytes = Vec::with_capacity(PREFIX + length);
    bytes.extend_from_slice(&prefix.to_le_bytes());
    message.encode_raw(&mut bytes);
    Ok(bytes)
}

/// Takes the first whole frame off the front of `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// When the bytes cannot become a frame; the connection is of no more use then.
pub fn take<M: Message + Default>(buffer: &mut Vec<u8>) -> Result<Option<M>, FrameError> {
    let Some((prefix, rest)) = buffer.split_first_chunk::<PREFIX>() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
    if length > MAX_LENGTH {
        return Err(FrameError::TooLong { length });
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let message = M::decode(body).map_err(|_| FrameError::Malformed)?;
    buffer.drain(..PREFIX + length);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Request, request::Call};

    fn request() -> Request {
        Request { id: 7, call: Some(Call::Start(())) }
    }

    #[test]
    fn a_frame_comes_back_whatever_the_pieces() {
        let bytes = [encode(&request()).unwrap(), encode(&request()).unwrap()].concat();
        for size in 1..=bytes.len() {
            let (mut buffer, mut seen) = (Vec::new(), 0);
            for piece in bytes.chunks(size) {
                buffer.extend_from_slice(piece);
                while let Some(message) = take::<Request>(&mut buffer).unwrap() {
                    assert_eq!(message, request());
                    seen += 1;
                }
            }
            assert_eq!((seen, buffer.len()), (2, 0), "pieces of {size}");
        }
    }

    #[test]
    fn bytes_that_are_no_frame_are_refused() {
        assert!(matches!(take::<Request>(&mut vec![0xff; 4]), Err(FrameError::TooLong { .. })));
        assert_eq!(take::<Request>(&mut vec![1, 0, 0, 0, 0xff]), Err(FrameError::Malformed));
        assert_eq!(take::<Request>(&mut Vec::new()), Ok(None));
    }
}
