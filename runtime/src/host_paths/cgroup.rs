//! What a worker does in the directories of cgroups.

use std::io;
use std::path::Path;

use berth_cgroup::{Direct, Files, OpenFor};
use berth_sys::errno::EIO;

use super::message::{FoundTree, OpenControl, Outcomes, Paths, Tell, bytes_of, paths_of};
use super::worker::Found;

/// The most bytes of paths in one answer.
const MOST_BYTES: usize = 4 * 1024 * 1024;

pub(super) fn open(asked: &OpenControl) -> Found {
    let purpose = if asked.for_writing { OpenFor::Writing } else { OpenFor::Reading };
    let (mut errnos, mut files) = (Vec::new(), Vec::new());
    for opened in Direct.open(&paths_of(&asked.paths), purpose) {
        errnos.push(errno(opened.as_ref().err()));
        files.extend(opened.ok());
    }
    (Tell::Outcomes(Outcomes { errnos }), files)
}

/// The directories below one, less the first `known` of them.
pub(super) fn tree(directory: &Path, known: u64) -> io::Result<FoundTree> {
    let known = usize::try_from(known).unwrap_or(usize::MAX);
    let mut found = FoundTree::default();
    let mut bytes = 0;
    for path in Direct.tree(directory)?.iter().skip(known) {
        if bytes > MOST_BYTES {
            found.is_cut = true;
            break;
        }
        let relative = bytes_of(path.strip_prefix(directory).unwrap_or(path));
        // And what it takes in the message.
        bytes += relative.len() + 8;
        found.paths.push(relative);
    }
    Ok(found)
}

pub(super) fn remove(asked: &Paths) -> Outcomes {
    let removed = Direct.remove(&paths_of(&asked.paths));
    Outcomes { errnos: removed.iter().map(|removed| errno(removed.as_ref().err())).collect() }
}

fn errno(error: Option<&io::Error>) -> i32 {
    error.map_or(0, |error| error.raw_os_error().unwrap_or(EIO))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use berth_sys::errno::ENOENT;

    use super::*;

    #[test]
    fn files_are_opened_listed_and_removed_below_a_directory() {
        let top = tempfile::tempdir().unwrap();
        let path = |name: &str| bytes_of(&top.path().join(name));
        std::fs::create_dir_all(top.path().join("one/below")).unwrap();
        std::fs::write(top.path().join("file"), "content").unwrap();
        let asked = OpenControl {
            directories: vec![path("")],
            paths: vec![path("absent"), path("file")],
            for_writing: false,
        };
        let (tell, mut files) = open(&asked);
        assert_eq!(tell, Tell::Outcomes(Outcomes { errnos: vec![ENOENT, 0] }));
        let mut text = String::new();
        files.pop().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), files.len()), ("content", 0));

        let found = tree(top.path(), 0).unwrap();
        assert_eq!(
            (found.paths, found.is_cut),
            (vec![vec![], b"one".to_vec(), b"one/below".to_vec()], false)
        );
        assert_eq!(tree(top.path(), 2).unwrap().paths, [b"one/below".to_vec()]);

        let removed = remove(&Paths { paths: vec![path("one"), path("absent")] });
        assert_eq!(removed.errnos, [0, 0]);
        assert!(!top.path().join("one").exists());
    }
}
