//! SPDY/3.1, as far as Kubernetes uses it: framing, header blocks and streams over one connection.
//!
//! The wire is that of the SPDY protocol draft 3.1 (Chromium project). Left out, because no client
//! of the CRI uses it: windows (`WINDOW_UPDATE` is read and ignored; [`connection`] says what
//! takes their place), priorities, settings, and streams opened by the server.
//!
//! Everything that a peer can make large has a limit: control frames, header blocks before and
//! after decompression, the number of open streams, and the data that waits for a reader.

pub mod connection;
mod dictionary;
pub mod frame;
pub mod header_block;

pub use connection::{Connection, Limits, Stream};
pub use frame::{Decoder, Encoder, Frame, ResetStatus};
pub use header_block::Headers;

/// Why the bytes of a peer cannot be read. The connection is unusable after any of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A control frame of another protocol version.
    #[error("a frame of SPDY version {0}, not 3")]
    Version(u16),
    /// A control frame longer than [`frame::MAX_CONTROL_BYTES`].
    #[error("a control frame of {0} bytes")]
    TooLong(usize),
    /// A frame whose length or fields do not fit its type.
    #[error("a malformed {0} frame")]
    Malformed(&'static str),
    /// A header block that is not a zlib stream with the dictionary of SPDY/3.
    #[error("a header block that cannot be decompressed")]
    Compression,
    /// A header block over a limit of [`header_block`].
    #[error("a header block that is too large")]
    HeadersTooLarge,
    /// A header block whose contents are not name/value pairs.
    #[error("a malformed header block")]
    Headers,
    /// A stream id that the peer may not open, has used before, or has never opened.
    #[error("stream id {0} out of order")]
    StreamId(u32),
}
