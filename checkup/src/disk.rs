//! The daemon's directories: whether they are writable, and how much space their filesystems have.

use std::path::{Path, PathBuf};

use crate::{Daemon, Finding, Grade, below, finding, text};

/// Below this many free inodes, the root will soon have none: an image of a distribution has
/// some ten thousand files.
const FEW_INODES: u64 = 20_000;

/// What the runtime state may need, in bytes: for a pod a few files, and the pods' shared memory is
/// not counted here.
const STATE_BYTES: u64 = 16 << 20;

/// The same in inodes: a pod of one container has some twenty.
const STATE_INODES: u64 = 2000;

pub(crate) fn look(node: &Path, daemon: &Daemon) -> Vec<Finding> {
    let mounts = text(node, "proc/self/mountinfo").unwrap_or_default();
    let mut findings = Vec::new();
    for (path, is_root) in [(&daemon.root, true), (&daemon.state, false)] {
        if is_read_only(&mounts, path) {
            let text = format!(
                "{} is on a read-only file system: mount it writable, or set another root and state in berth.toml",
                path.display()
            );
            findings.push(finding(Grade::Broken, "disk", text));
            continue;
        }
        match berth_sys::file::space(&nearest(node, path)) {
            Ok(space) if is_root => findings.push(root(path, daemon, space)),
            Ok(space) => findings.extend(state(path, space)),
            Err(error) => {
                let text = format!("cannot look up {}: {error}", path.display());
                findings.push(finding(Grade::Broken, "disk", text));
            }
        }
    }
    findings
}

/// The directory itself, or where it would be created.
fn nearest(node: &Path, path: &Path) -> PathBuf {
    let whole = below(node, path);
    let found = whole.ancestors().take_while(|path| path.starts_with(node)).find(|path| path.exists());
    found.unwrap_or(node).to_owned()
}

type Space = (u64, u64, u64, u64);

fn root(path: &Path, daemon: &Daemon, (bytes, free, inodes, inodes_free): Space) -> Finding {
    let share = bytes / 100 * u64::from(daemon.min_free_percent);
    let (floor, key) = if share > daemon.min_free_bytes {
        (share, "image.min_free_percent")
    } else {
        (daemon.min_free_bytes, "image.min_free_bytes")
    };
    let shown = path.display();
    if free < floor {
        let text = format!(
            "{shown} has {} MiB free, and {} MiB must stay free, so no image can be pulled: free some space, or lower {key}",
            free >> 20,
            floor >> 20
        );
        return finding(Grade::Broken, "disk", text);
    }
    // A filesystem without a fixed number, such as btrfs, reports 0.
    if inodes > 0 && inodes_free < FEW_INODES {
        let text =
            format!("{shown} has {inodes_free} inodes left, fewer than an image may need: remove files");
        return finding(Grade::Broken, "disk", text);
    }
    finding(Grade::Good, "disk", format!("{shown} has {} MiB free", free >> 20))
}

fn state(path: &Path, (_, free, inodes, inodes_free): Space) -> Option<Finding> {
    let shown = path.display();
    let text = if free < STATE_BYTES {
        format!(
            "{shown} has {} KiB free, too little for pods: free some space, or mount the tmpfs with a larger size=",
            free >> 10
        )
    } else if inodes > 0 && inodes_free < STATE_INODES {
        format!(
            "{shown} has {inodes_free} inodes left, too few for pods: remove files, or mount the tmpfs with a larger nr_inodes="
        )
    } else {
        return None;
    };
    Some(finding(Grade::Broken, "disk", text))
}

/// Whether `path` is below a mount that is read-only, or whose filesystem is:
/// `proc_pid_mountinfo(5)`, fields 5, 6 and the last.
fn is_read_only(mounts: &str, path: &Path) -> bool {
    let mut found: Option<(usize, bool)> = None;
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let (Some(place), Some(options), Some(of_filesystem)) = (words.get(4), words.get(5), words.last())
        else {
            continue;
        };
        let place = unescaped(place);
        if !path.starts_with(&place) {
            continue;
        }
        let depth = Path::new(&place).components().count();
        // Of two mounts at the same path the later one is visible.
        if found.is_none_or(|(deepest, _)| depth >= deepest) {
            let read_only =
                [options, of_filesystem].iter().any(|list| list.split(',').any(|word| word == "ro"));
            found = Some((depth, read_only));
        }
    }
    found.is_some_and(|(_, read_only)| read_only)
}

/// A path of mountinfo, where space, tab, line end and backslash are octal numbers.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{daemon, node, troubles};

    #[test]
    fn a_root_that_is_fuller_than_images_may_make_it_is_named_with_the_key() {
        for (daemon, key) in [
            (Daemon { min_free_bytes: u64::MAX, ..daemon() }, "lower image.min_free_bytes"),
            (Daemon { min_free_percent: 100, ..daemon() }, "lower image.min_free_percent"),
        ] {
            let troubles = troubles(&[], &daemon);
            let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
            assert_eq!((trouble.grade, trouble.subject.as_ref()), (Grade::Broken, "disk"));
            assert!(trouble.text.contains(key) && trouble.text.contains("/var/lib/berth"), "{trouble:?}");
        }
    }

    #[test]
    fn space_and_inodes_are_judged_by_the_numbers() {
        let path = Path::new("/var/lib/berth");
        let daemon = Daemon::default();
        let gib = 1 << 30;
        for (space, expected) in [
            ((100 * gib, 50 * gib, 1 << 20, 1 << 19), Grade::Good),
            ((100 * gib, 5 * gib, 1 << 20, 1 << 19), Grade::Good),
            ((100 * gib, 5 * gib - (2 << 20), 1 << 20, 1 << 19), Grade::Broken),
            ((2 * gib, gib, 1 << 20, 1 << 19), Grade::Good),
            ((2 * gib, gib - 1, 1 << 20, 1 << 19), Grade::Broken),
            ((100 * gib, 50 * gib, 1 << 20, 19_999), Grade::Broken),
            ((100 * gib, 50 * gib, 0, 0), Grade::Good),
            ((0, 0, 0, 0), Grade::Broken),
        ] {
            assert_eq!(root(path, &daemon, space).grade, expected, "{space:?}");
        }
        for (space, words) in [
            ((64 << 20, 32 << 20, 10_000, 5000), None),
            ((64 << 20, 1 << 20, 10_000, 5000), Some("1024 KiB free")),
            ((64 << 20, 32 << 20, 10_000, 10), Some("10 inodes left")),
            ((64 << 20, 32 << 20, 0, 0), None),
        ] {
            let found = state(Path::new("/run/berth"), space).map(|finding| finding.text);
            assert_eq!(found.is_some(), words.is_some(), "{space:?}: {found:?}");
            assert!(found.unwrap_or_default().contains(words.unwrap_or_default()), "{space:?}");
        }
    }

    #[test]
    fn a_directory_on_a_read_only_file_system_is_named() {
        let mounts =
            "1 0 8:1 / / ro,relatime shared:1 - ext4 /dev/sda1 rw\n2 1 0:9 / /run rw - tmpfs tmpfs rw\n";
        let troubles = troubles(&[("proc/self/mountinfo", Some(mounts))], &daemon());
        let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
        assert!(trouble.text.starts_with("/var/lib/berth is on a read-only file system: "), "{trouble:?}");
    }

    #[test]
    fn the_mount_that_counts_is_the_last_of_the_deepest() {
        let line = |place: &str, options: &str, of_filesystem: &str| {
            format!("1 0 8:1 / {place} {options} shared:1 - ext4 /dev/sda1 {of_filesystem}\n")
        };
        let (rw, ro) = (line("/", "rw", "rw"), line("/", "ro,noatime", "rw"));
        for (mounts, read_only) in [
            (String::new(), false),
            (rw.clone(), false),
            (ro.clone(), true),
            (line("/", "rw", "ro,errors=remount-ro"), true),
            (line("/", "rw", "rw,errors=remount-ro"), false),
            (ro.clone() + &line("/var/lib", "rw", "rw"), false),
            (line("/var/lib", "rw", "rw") + &ro, false),
            (rw.clone() + &line("/var/lib/berth", "ro", "rw"), true),
            (line("/var/lib", "ro", "rw") + &line("/var/lib", "rw", "rw"), false),
            (rw.clone() + &line("/var/lib/berth-other", "ro", "rw"), false),
            ("garbage\n\n1 2 3\n".to_owned(), false),
        ] {
            assert_eq!(is_read_only(&mounts, Path::new("/var/lib/berth")), read_only, "{mounts}");
        }
        assert!(is_read_only(&line("/with\\040space", "ro", "rw"), Path::new("/with space/x")));
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_where_it_will_be() {
        let node = node(&[]);
        assert_eq!(nearest(node.path(), Path::new("/var/lib/berth")), node.path().join("var/lib/berth"));
        assert_eq!(nearest(node.path(), Path::new("/var/lib/none/such")), node.path().join("var/lib"));
        assert_eq!(nearest(node.path(), Path::new("/none")), node.path());
    }
}
