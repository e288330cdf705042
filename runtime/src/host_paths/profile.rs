//! A seccomp profile of the node, as it is in its file.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use berth_seccomp::MAX_PROFILE_BYTES;

/// The bytes of a profile; of one that is too large, enough for the parser to refuse it.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file =
        std::fs::File::options().read(true).custom_flags(berth_sys::file::READ_NONBLOCKING).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = Vec::new();
    file.take(MAX_PROFILE_BYTES as u64 + 1).read_to_end(&mut text)?;
    Ok(text)
}
