//! Programs built by `scripts/build-peer`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The directory with the programs of the peer `name`, one of those that `scripts/build-peer`
/// lists.
///
/// # Errors
/// When it has not been built; the message says how to build it.
pub fn directory(name: &str) -> Result<PathBuf> {
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/peers");
    let built = fs::read_dir(&peers).into_iter().flatten().filter_map(Result::ok).find(|entry| {
        let directory = entry.file_name();
        // NAME-VERSION; NAME-VERSION.new while it is being built.
        let directory = directory.to_string_lossy();
        directory.strip_prefix(name).and_then(|rest| rest.strip_prefix('-')).is_some_and(|version| {
            version.starts_with(|first: char| first.is_ascii_digit()) && !version.ends_with(".new")
        })
    });
    let built = built.with_context(|| {
        format!("there is no {name} in {}: run scripts/build-peer {name}", peers.display())
    })?;
    Ok(built.path())
}
