//! The exit record: a small file that a shim writes when its container has ended, before it tells
//! anyone.
//!
//! ```text
//! 8 bytes  "BERTHEX1"
//! 8 bytes  FNV-1a checksum (64 bit, little-endian) of all that follows
//! rest     ExitRecord, protobuf
//! ```
//! It is written under another name and renamed, so that it is there whole or not at all; the
//! checksum finds what a power cut or a disk made of it.

use prost::Message;

const MAGIC: &[u8; 8] = b"BERTHEX1";

/// The largest file that is read as an exit record; one has some 30 bytes plus the message of a
/// failed start.
pub const MAX_BYTES: usize = 64 * 1024;

/// How a container ended.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExitRecord {
    /// The exit code, or 128 + the signal.
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
    /// The signal that ended it, or 0.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// The OOM killer killed in its cgroup.
    #[prost(bool, tag = "3")]
    pub oom_killed: bool,
    /// When its program began, in nanoseconds since the epoch; 0 when it never did.
    #[prost(int64, tag = "4")]
    pub started_at_unix_ns: i64,
    /// When it ended, in nanoseconds since the epoch.
    #[prost(int64, tag = "5")]
    pub finished_at_unix_ns: i64,
    /// Why its program could not be started; empty when it was.
    #[prost(string, tag = "6")]
    pub start_error: String,
    /// Bytes of output that could not be written to the log.
    #[prost(uint64, tag = "7")]
    pub log_bytes_lost: u64,
    /// The log did not take everything in time: what it was given is written to it when it goes on,
    /// if it ever does, and then how many bytes are missing.
    #[prost(bool, tag = "9")]
    pub log_incomplete: bool,
    /// Written by the daemon, because the shim was lost: code and time are not the container's.
    #[prost(bool, tag = "8")]
    pub lost: bool,
}

/// The file is not an exit record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged;

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not a whole exit record")
    }
}

impl std::error::Error for Damaged {}

/// The file's bytes.
#[must_use]
pub fn encode(record: &ExitRecord) -> Vec<u8> {
    let body = record.encode_to_vec();
    [MAGIC.as_slice(), &checksum(&body).to_le_bytes(), &body].concat()
}

/// The record in the file's bytes.
///
/// # Errors
/// [`Damaged`] when a single bit is not as written.
pub fn decode(bytes: &[u8]) -> Result<ExitRecord, Damaged> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(Damaged)?;
    let (sum, body) = rest.split_first_chunk::<8>().ok_or(Damaged)?;
    if u64::from_le_bytes(*sum) != checksum(body) {
        return Err(Damaged);
    }
    ExitRecord::decode(body).map_err(|_| Damaged)
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_does_not() {
        let record = ExitRecord {
            exit_code: 137,
            signal: 9,
            oom_killed: true,
            started_at_unix_ns: 5,
            finished_at_unix_ns: i64::MAX,
            ..ExitRecord::default()
        };
        let bytes = encode(&record);
        assert_eq!(decode(&bytes), Ok(record));
        for position in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[position] ^= 1;
            assert_eq!(decode(&damaged), Err(Damaged), "bit at {position}");
            assert_eq!(decode(&bytes[..position]), Err(Damaged), "cut at {position}");
        }
    }
}
