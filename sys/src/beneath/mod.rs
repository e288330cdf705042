//! Paths inside a tree that an attacker wrote: an image's layer, a container's root.
//!
//! Everything is relative to a directory descriptor. A path of several components is resolved by
//! the kernel with `openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)`: symbolic links and `..` are
//! followed, but as if the tree's root were `/` (openat2(2)). Operations that change the tree take
//! a [`Dir`] and one name in it, and never follow a link in that name. There is no fallback for
//! kernels without openat2 (Linux 5.6): a weaker walk would be a hole.
//!
//! `RESOLVE_IN_ROOT` answers `EAGAIN` while directories inside the tree are renamed (openat2(2),
//! ERRORS); it is retried [`MAX_TRIES`] times, then the call fails.
//!
//! Callers decide what to do with types, owners and modes. Errors are the kernel's errno.

mod dir;
mod inode;
mod listing;
mod root;
mod walk;

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

pub use dir::{Dir, Node};
pub use inode::{FileType, Stat, Timestamp, chmod, chown, set_times, stat_fd};
pub use root::{MissingDir, Root};
pub use walk::{Usage, Walk};

/// How often an `EAGAIN` of openat2 is retried. A storm of renames that lasts through 128 tries is
/// an attack.
pub const MAX_TRIES: usize = 128;

/// Opens an `O_PATH` descriptor again. The descriptor pins the inode; the link in /proc leads to
/// exactly it.
fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let path = proc_path(fd);
    // SAFETY: open(2) takes a NUL-terminated path, and no mode without O_CREAT.
    retry_interrupted(|| unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }).map(owned)
}

fn proc_path(fd: BorrowedFd<'_>) -> CString {
    let mut text = format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).into_bytes();
    text.push(0);
    CString::from_vec_with_nul(text).unwrap_or_default()
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| invalid())
}

/// Target of the link `name` in `directory`, or of the link that `directory` itself stands for when
/// `name` is empty.
fn read_link_at(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<OsString> {
    // A target is shorter than PATH_MAX (symlink(7)), so it always fits and is never cut.
    let mut buffer = vec![0_u8; 4096];
    // SAFETY: readlinkat(2) writes at most the given length into the buffer, which has that length.
    let length = retry_interrupted_long(|| unsafe {
        libc::readlinkat(directory.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
    })?;
    buffer.truncate(length);
    Ok(OsString::from_vec(buffer))
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// Takes ownership of a descriptor that a call just returned.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: every caller passes what a successful open call has just returned: open, and owned by
    // nothing else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn retry_interrupted(mut call: impl FnMut() -> i32) -> io::Result<i32> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

fn retry_interrupted_long(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(result) = usize::try_from(call()) {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{OsStr, OsString};
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::{Path, PathBuf};

    use super::*;

    /// A directory with `root/` (the tree) and `canary` beside it (which must stay out of reach).
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            Self::below(&std::env::temp_dir(), name)
        }

        fn below(directory: &Path, name: &str) -> Self {
            let path = directory.join(format!("berth-beneath-{}-{name}", std::process::id()));
            fs::create_dir_all(path.join("root")).unwrap();
            fs::create_dir_all(path.join("canary")).unwrap();
            fs::write(path.join("canary/secret"), "host").unwrap();
            Self(path)
        }

        fn root(&self) -> Root {
            Root::open(&self.0.join("root")).unwrap()
        }

        fn inside(&self, path: &str) -> PathBuf {
            self.0.join("root").join(path)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let parent = Root::open(self.0.parent().unwrap()).unwrap().open_dir(Path::new("")).unwrap();
            parent.remove_all(self.0.file_name().unwrap()).unwrap();
        }
    }

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
        result.unwrap_err().raw_os_error().unwrap()
    }

    #[test]
    fn links_and_parents_stay_inside() {
        let tree = Tree::new("inside");
        let canary = tree.0.join("canary");
        symlink(&canary, tree.inside("absolute")).unwrap();
        symlink("../canary", tree.inside("relative")).unwrap();
        symlink("../../../../../../../../../../etc", tree.inside("far")).unwrap();
        let root = tree.root();
        for path in
            ["absolute", "relative", "far", "../canary", "/../canary", "absolute/secret", "far/passwd"]
        {
            assert_eq!(errno(root.resolve(Path::new(path))), libc::ENOENT, "{path}");
            assert_eq!(errno(root.open_regular(Path::new(path))), libc::ENOENT, "{path}");
        }
        let top = stat_fd(root.as_fd()).unwrap().identity;
        assert_eq!(stat_fd(root.resolve(Path::new("../..")).unwrap().as_fd()).unwrap().identity, top);
    }

    #[test]
    fn links_of_proc_are_never_followed() {
        let proc = Root::open(Path::new("/proc")).unwrap();
        assert_eq!(errno(proc.resolve(Path::new("self/root/etc"))), libc::ELOOP);
    }

    #[test]
    fn missing_directories_are_made_through_dangling_links_inside() {
        let tree = Tree::new("dangling");
        fs::create_dir(tree.inside("a")).unwrap();
        symlink("/x/../y/z", tree.inside("a/link")).unwrap();
        symlink("../../../canary/made", tree.inside("out")).unwrap();
        let mut made = Vec::new();
        tree.root()
            .make_dir_all_with(Path::new("a/link/deep"), |missing| {
                made.push(missing.path.to_owned());
                missing.parent.make_dir(missing.name, 0o755)
            })
            .unwrap();
        assert_eq!(made, ["x", "y", "y/z", "y/z/deep"].map(PathBuf::from));
        assert!(tree.inside("y/z/deep").is_dir());
        tree.root().make_dir_all(Path::new("out"), 0o755).unwrap();
        assert!(tree.inside("canary/made").is_dir());
        assert!(!tree.0.join("canary/made").exists());
    }

    #[test]
    fn link_loops_and_files_in_the_way_end_with_an_error() {
        let tree = Tree::new("loop");
        symlink("b", tree.inside("a")).unwrap();
        symlink("a", tree.inside("b")).unwrap();
        fs::write(tree.inside("file"), "").unwrap();
        let make = |path: &str| tree.root().make_dir_all(Path::new(path), 0o755);
        assert_eq!(errno(make("a/c")), libc::ELOOP);
        assert_eq!(errno(make("file/c")), libc::ENOTDIR);
    }

    #[test]
    fn names_with_a_path_in_them_are_refused() {
        let tree = Tree::new("names");
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        for name in ["", ".", "..", "a/b", "/", "../canary", "a\0b"] {
            let name = OsStr::new(name);
            assert_eq!(errno(dir.make_dir(name, 0o755)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.create_file(name, 0o644)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.remove_all(name)), libc::EINVAL, "{name:?}");
            assert_eq!(errno(dir.make_symlink(OsStr::new("x"), name)), libc::EINVAL, "{name:?}");
        }
    }

    #[test]
    fn a_link_in_the_last_place_is_neither_written_through_nor_changed_through() {
        let tree = Tree::new("last");
        let secret = tree.0.join("canary/secret");
        symlink(&secret, tree.inside("link")).unwrap();
        let before = fs::metadata(&secret).unwrap();
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        let link = OsStr::new("link");
        assert_eq!(errno(dir.create_file(link, 0o644)), libc::EEXIST);
        assert_eq!(errno(dir.chmod(link, 0o777)), libc::EOPNOTSUPP);
        assert_eq!(errno(dir.open_dir(link)), libc::ENOTDIR);
        dir.set_times(link, Timestamp { seconds: 7, nanoseconds: 9 }).unwrap();
        assert_eq!(dir.stat(link).unwrap().modified, Timestamp { seconds: 7, nanoseconds: 9 });
        dir.make_hard_link(OsStr::new("second"), &dir, link).unwrap();
        assert_eq!(dir.stat(OsStr::new("second")).unwrap().file_type, FileType::Symlink);
        let after = fs::metadata(&secret).unwrap();
        assert_eq!(
            (before.mtime(), before.mode(), before.nlink()),
            (after.mtime(), after.mode(), after.nlink())
        );
    }

    #[test]
    fn removal_takes_a_tree_deeper_than_any_path_and_follows_nothing() {
        // In memory: on ext4, the cost of creating or removing one directory grows with their
        // number.
        let tree = Tree::below(Path::new("/dev/shm"), "deep");
        let mut dir = tree.root().open_dir(Path::new("")).unwrap();
        let name = OsStr::new("d");
        for level in 0..100_000 {
            dir.make_dir(name, 0o700).unwrap();
            dir = dir.open_dir(name).unwrap();
            if level % 100 == 0 {
                dir.make_symlink(tree.0.join("canary").as_os_str(), OsStr::new("out")).unwrap();
                dir.create_file(OsStr::new("file"), 0o600).unwrap();
            }
        }
        // While held, it keeps those above it, and the kernel walks all of these with each one that
        // is removed.
        drop(dir);
        let top = tree.root().open_dir(Path::new("")).unwrap();
        let mut walk = Walk::new(&top).unwrap();
        while walk.step().unwrap() {}
        assert_eq!(walk.usage().inodes, 100_000 + 2 * 1000);
        top.remove_all(name).unwrap();
        assert_eq!(top.names(10).unwrap(), Vec::<OsString>::new());
        assert_eq!(fs::read(tree.0.join("canary/secret")).unwrap(), b"host");
        top.remove_all(name).unwrap();
    }

    #[test]
    fn removal_takes_a_directory_wider_than_one_listing() {
        let tree = Tree::new("wide");
        fs::create_dir(tree.inside("wide")).unwrap();
        for i in 0..3000 {
            fs::write(tree.inside(&format!("wide/a-rather-long-name-for-one-file-{i}")), "").unwrap();
        }
        let top = tree.root().open_dir(Path::new("")).unwrap();
        let wide = top.open_dir(OsStr::new("wide")).unwrap();
        assert_eq!(wide.names(5000).unwrap().len(), 3000);
        assert_eq!(errno(wide.names(2999)), libc::EOVERFLOW);
        top.remove_all(OsStr::new("wide")).unwrap();
        assert!(!tree.inside("wide").exists());
    }

    /// Many mount points in one place and one deep down: everything else is removed, and the mounts
    /// are not entered.
    #[test]
    fn removal_leaves_what_is_stuck_and_takes_the_rest() {
        const WIDE: usize = 500;
        let tree = Tree::new("stuck");
        for i in 0..WIDE {
            fs::create_dir_all(tree.inside(&format!("t/wide/a-rather-long-name-for-one-directory-{i}/x/y")))
                .unwrap();
        }
        fs::create_dir_all(tree.inside("t/deep/er/mounted")).unwrap();
        let places = [
            tree.inside("t/deep/er/mounted"),
            tree.inside("t/wide/a-rather-long-name-for-one-directory-7/x"),
        ];
        for place in &places {
            crate::mount::bind(&tree.0.join("canary"), place).unwrap();
        }
        let top = tree.root().open_dir(Path::new("")).unwrap();
        let removed = top.remove_all(OsStr::new("t"));
        let left: Vec<usize> = ["t", "t/wide", "t/deep", "t/deep/er"]
            .map(|path| fs::read_dir(tree.inside(path)).map_or(0, Iterator::count))
            .to_vec();
        for place in &places {
            crate::mount::detach(place).unwrap();
        }
        assert_eq!((errno(removed), left), (libc::EBUSY, vec![2, 1, 1, 1]));
        assert_eq!(fs::read(tree.0.join("canary/secret")).unwrap(), b"host");
        top.remove_all(OsStr::new("t")).unwrap();
        assert!(!tree.inside("t").exists());
    }

    #[test]
    fn device_numbers_that_do_not_fit_are_refused() {
        let tree = Tree::new("device");
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        for (major, minor) in [(1 << 12, 0), (0, 1 << 20), (u32::MAX, u32::MAX)] {
            let made = dir.make_node(OsStr::new("dev"), Node::CharDevice(major, minor), 0o600);
            assert_eq!(errno(made), libc::EINVAL);
        }
        dir.make_node(OsStr::new("pipe"), Node::Fifo, 0o600).unwrap();
        assert_eq!(dir.stat(OsStr::new("pipe")).unwrap().file_type, FileType::Fifo);
        assert_eq!(errno(tree.root().open_regular(Path::new("pipe"))), libc::EINVAL);
    }

    #[test]
    fn what_is_opened_for_appending_is_a_file_and_nothing_else_is_touched() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let tree = Tree::new("append");
        let dir = tree.root().open_dir(Path::new("")).unwrap();
        dir.make_node(OsStr::new("pipe"), Node::Fifo, 0o600).unwrap();
        // A device without a driver: opening it fails with another error, after a search for a
        // module.
        dir.make_node(OsStr::new("device"), Node::CharDevice(4000, 1), 0o600).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(tree.inside("socket")).unwrap();
        fs::create_dir(tree.inside("directory")).unwrap();
        fs::write(tree.inside("two"), "names").unwrap();
        fs::hard_link(tree.inside("two"), tree.inside("names")).unwrap();
        symlink("file", tree.inside("link")).unwrap();
        symlink("nowhere", tree.inside("dangling")).unwrap();
        let reader = tree.root().open_with(Path::new("pipe"), crate::file::READ_NONBLOCKING).unwrap();
        let open = |name: &str| tree.root().open_append(Path::new(name));
        for name in ["pipe", "device", "socket", "directory", "two", "names"] {
            assert_eq!(errno(open(name)), libc::EINVAL, "{name}");
        }
        for name in ["link", "dangling"] {
            assert_eq!(errno(open(name)), libc::ELOOP, "{name}");
        }
        // A reader sees a hang-up if there was a writer, pipe(7).
        let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polled, PollTimeout::ZERO).unwrap(), 0);
        for text in ["a", "b"] {
            io::Write::write_all(&mut open("file").unwrap(), text.as_bytes()).unwrap();
        }
        assert_eq!(fs::read(tree.inside("file")).unwrap(), b"ab");
        assert_eq!(fs::metadata(tree.inside("file")).unwrap().mode() & 0o777, 0o640);
        assert!(!tree.inside("nowhere").exists());
    }

    #[test]
    fn renames_by_others_do_not_open_a_way_out() {
        let tree = Tree::new("race");
        fs::create_dir_all(tree.inside("a/b")).unwrap();
        fs::create_dir_all(tree.inside("c")).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::rename(tree.inside("a/b"), tree.inside("c/b"));
                    let _ = fs::rename(tree.inside("c/b"), tree.inside("a/b"));
                }
            });
            let root = tree.root();
            for _ in 0..2000 {
                if let Ok(fd) = root.resolve(Path::new("a/b/../../../canary/secret")) {
                    panic!("left the tree: {fd:?}");
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
