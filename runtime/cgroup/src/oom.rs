//! Where the kernel counts the processes that it killed for memory.

use std::path::PathBuf;

use crate::cgroup::Place;
use crate::{Cgroup, control_file};

/// A file and the key in it whose number rises with every process killed: read it before and after,
/// and compare.
///
/// v2: `memory.events`, which counts for sub-cgroups too. v1: `memory.oom_control` (the key since
/// Linux 4.13), which does not, so kills inside a cgroup that the container made itself are not
/// seen there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OomSource {
    /// The file.
    pub file: PathBuf,
    /// The key in it.
    pub key: &'static str,
}

impl Cgroup {
    /// The counter of this cgroup; `None` without a memory controller.
    #[must_use]
    pub fn oom_source(&self) -> Option<OomSource> {
        let file = match self.place {
            Place::Unified(_) => "memory.events",
            Place::Legacy(_) => "memory.oom_control",
        };
        Some(OomSource { file: self.dir_of("memory")?.join(file), key: "oom_kill" })
    }
}

/// The counter in the bytes of [`OomSource::file`]; nothing when the key is not there.
#[must_use]
pub fn parse_oom_kills(bytes: &[u8], key: &str) -> Option<u64> {
    control_file::keyed(bytes, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_have_the_key() {
        for (bytes, kills) in [
            (&b"oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"[..], Some(3)),
            (b"low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n", Some(1)),
            (b"oom_kill_disable 0\nunder_oom 0\n", None),
            (b"", None),
            (b"oom_kill", None),
            (b"oom_kill \xff\n", None),
        ] {
            assert_eq!(parse_oom_kills(bytes, "oom_kill"), kills);
        }
    }
}
