//! The corpus of the fuzz targets, through the functions that they call: no panic, no hang, little
//! memory.
//!
//! The only test of this program, because it measures the memory of the whole process.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use berth_streaming::fuzzing;

/// Reads an input.
type Read = fn(&[u8]);

/// What each of the targets in `fuzz/targets` calls.
const TARGETS: [(&str, Read); 4] = [
    ("request", fuzzing::request),
    ("spdy_connection", fuzzing::spdy_connection),
    ("spdy_frames", fuzzing::spdy_frames),
    ("websocket", fuzzing::websocket),
];

/// More than one connection may hold (1 MiB of data, and what it takes to read it), and the
/// allocator keeps.
const MOST_KIB: u64 = 16 * 1024;

/// The most memory that this process has had, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("our own status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim_end_matches("kB").trim().parse().expect("a number")
}

/// The names in a directory, without endings.
fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        path.file_stem().expect("a name").to_string_lossy().into_owned()
    };
    entries.map(name).collect()
}

#[test]
fn the_corpus_is_read_to_its_end_with_little_memory() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let expected: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz.join("targets")), expected);
    assert_eq!(names(&fuzz.join("corpus")), expected);
    // What is made once for all.
    fuzzing::request(b"");
    let before = peak();
    for (target, read) in TARGETS {
        let corpus = fuzz.join("corpus").join(target);
        for name in names(&corpus) {
            let input = fs::read(corpus.join(&name)).expect("an input");
            assert!(std::panic::catch_unwind(|| read(&input)).is_ok(), "{target}/{name}");
            let more = peak() - before;
            assert!(more < MOST_KIB, "{target}/{name}: {more} KiB");
        }
    }
}
